"""Poolers in the place of detectron2's ROIPooler, and MaskVoting's choice of seeds and voters."""

import pytest
import torch
import torch.nn.functional as F

from d2ext.ops import (
    MaskVoting,
    PyramidROIAlignPooler,
    RoIWarpPooler,
    pool_averaged,
    roi_warp,
    roi_warp_max_pool,
    vote_candidates,
)
from d2ext.ops.mask_voting import inclusive_iou
from d2ext.ops.poolers import boxes_to_rois

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes


@pytest.fixture
def box_lists():
    return [
        Boxes(torch.tensor([[16.0, 16.0, 80.0, 96.0], [0.0, 0.0, 47.0, 31.0]])),
        Boxes(torch.zeros(0, 4)),
        Boxes(torch.tensor([[10.5, 20.5, 70.25, 60.75]])),
    ]


def test_warp_pooler_stands_where_detectron2_takes_its_own(box_lists):
    feature = torch.randn(3, 4, 8, 9)
    ours = RoIWarpPooler(7, [1 / 16])
    theirs = ROIPooler(7, [1 / 16], sampling_ratio=1, pooler_type="ROIAlignV2")
    torch.testing.assert_close(ours([feature], box_lists), theirs([feature], box_lists))
    assert ours.output_size == theirs.output_size
    empty = [Boxes(torch.zeros(0, 4))] * 3
    assert ours([feature], empty).shape == theirs([feature], empty).shape


def test_warp_pooler_makes_corners_inclusive_for_mncs_sampling(box_lists):
    feature = torch.randn(3, 4, 8, 9)
    rois = torch.tensor([[0, 16, 16, 79, 95], [0, 0, 0, 46, 30], [2, 10.5, 20.5, 69.25, 59.75]])
    options = {"aligned": False, "quantize": True}
    pooler = RoIWarpPooler(3, [1 / 16], **options)
    expected = roi_warp(feature, rois, 3, 1 / 16, **options)
    assert torch.equal(pooler([feature], box_lists), expected)
    pooler = RoIWarpPooler((3, 2), [1 / 16], max_pool=True, **options)
    expected = roi_warp_max_pool(feature, rois, (3, 2), 1 / 16, **options)
    assert torch.equal(pooler([feature], box_lists), expected)


def test_gradients_reach_the_boxes(box_lists):
    for boxes in box_lists:
        boxes.tensor.requires_grad_()
    pooler = RoIWarpPooler(3, [1 / 16], aligned=False)
    pooler([torch.randn(3, 4, 8, 9)], box_lists).square().sum().backward()
    assert all(boxes.tensor.grad.abs().sum() > 0 for boxes in box_lists if len(boxes))


def test_rois_of_several_images_name_their_image(box_lists):
    rows = boxes_to_rois(box_lists)
    counts = [len(boxes) for boxes in box_lists]
    assert rows[:, 0].tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
    assert torch.equal(rows[:, 1:], torch.cat([boxes.tensor for boxes in box_lists]))
    pixels = boxes_to_rois(box_lists, inclusive=True)
    assert torch.equal(rows - pixels, torch.tensor([0.0, 0, 0, 1, 1]).expand_as(rows))


def test_poolers_refuse_what_they_cannot_do(box_lists):
    with pytest.raises(ValueError, match="every scale must be half of the one before"):
        RoIWarpPooler(7, [1 / 16, 1 / 8])
    feature = torch.randn(3, 4, 8, 9)
    with pytest.raises(ValueError, match="one feature level expected, got 2"):
        RoIWarpPooler(7, [1 / 16])([feature, feature], box_lists)
    with pytest.raises(ValueError, match="3 images but 1 box lists"):
        RoIWarpPooler(7, [1 / 16])([feature], box_lists[:1])


def test_pyramid_pooler_stands_where_detectron2_takes_its_own(box_lists):
    features = [torch.randn(3, 4, 24 >> i, 28 >> i) for i in range(3)]
    scales = [1 / 4, 1 / 8, 1 / 16]
    ours = PyramidROIAlignPooler((7, 7), scales, 2)
    theirs = ROIPooler(7, scales, 2, "ROIAlignV2")
    wanted = theirs(features, box_lists)
    torch.testing.assert_close(ours(features, box_lists), wanted, rtol=1e-5, atol=1e-5)
    assert ours.output_size == theirs.output_size and ours.state_dict() == {}
    empty = [Boxes(torch.zeros(0, 4))] * 3
    assert ours(features, empty).shape == (0, 4, 7, 7)
    assert ours([f[:0] for f in features], []).shape == (0, 4, 7, 7)
    with pytest.raises(ValueError, match="3 feature levels expected, got 1"):
        ours(features[:1], box_lists)
    with pytest.raises(ValueError, match="3 images but 2 box lists"):
        ours(features, box_lists[:2])
    with pytest.raises(ValueError, match="output size 7 x 7 is no multiple of 2"):
        ours(features, box_lists, average=2)


def test_pyramid_pooler_keeps_boxes_exact_beside_half_precision(box_lists):
    features = [torch.randn(3, 4, 24, 28).bfloat16()]
    ours = PyramidROIAlignPooler(7, [1 / 4], 2)
    wanted = ours([features[0].float()], box_lists).bfloat16()
    assert torch.equal(ours(features, box_lists), wanted)
    doubles = [Boxes(b.tensor) for b in box_lists]
    for boxes in doubles:
        boxes.tensor = boxes.tensor.double()
    assert torch.equal(ours(features, doubles), wanted)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (5, 5), (7, 14)])
def test_averaged_pooling_is_adaptive_pooling_of_any_pooler(box_lists, size):
    features = [torch.randn(3, 4, 24 >> i, 28 >> i) for i in range(2)]
    scales = [1 / 4, 1 / 8]
    theirs = ROIPooler(14, scales, 0, "ROIAlignV2")
    wanted = F.adaptive_avg_pool2d(theirs(features, box_lists), size)
    assert torch.equal(pool_averaged(theirs, features, box_lists, size), wanted)
    ours = PyramidROIAlignPooler(14, scales, 0)
    found = pool_averaged(ours, features, box_lists, size)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_iou_counts_pixels():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 4.0], [20.0, 20.0, 20.0, 20.0]])
    expected = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert inclusive_iou(boxes, boxes).tolist() == expected


def test_all_overlapping_boxes_vote_with_the_scores_of_the_class():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 7], [30, 30, 40, 40]])
    scores = torch.tensor([[0.6, 0.1], [0.2, 0.0], [0.9, 0.9]])
    index, offset, weight = vote_candidates(
        boxes, scores, torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1])
    )
    assert index.tolist() == [0, 1, 2, 0, 1] and index.dtype == torch.int32
    assert offset.tolist() == [0, 2, 3, 5] and offset.dtype == torch.int32
    assert weight.tolist() == pytest.approx([0.75, 0.25, 1.0, 1.0, 0.0])
    # scores of zero everywhere share equally
    weight = vote_candidates(boxes, 0 * scores, torch.tensor([0]), torch.tensor([0]))[2]
    assert weight.tolist() == [0.5, 0.5]


def test_voting_keeps_the_best_seeds_of_all_classes():
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [0, 20, 9, 29]])
    masks = torch.ones(3, 5, 5)
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.1, 0.7]])
    result = MaskVoting(max_per_image=3)(boxes, masks, scores, (30, 30))
    assert list(zip(result.seeds.tolist(), result.classes.tolist(), strict=True)) == [
        (0, 0), (1, 0), (2, 1),
    ]  # fmt: skip
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert result.boxes.tolist() == [[0, 0, 9, 9], [20, 0, 29, 9], [0, 20, 9, 29]]
    many = MaskVoting(score_threshold=0.75)(boxes, masks[:, None], scores, (30, 30))
    assert many.scores.tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize("mode", ["fcis", "mnc", "crop"])
def test_voting_of_no_boxes_gives_no_results(mode):
    result = MaskVoting(mode=mode)(
        torch.zeros(0, 4), torch.zeros(0, 1, 5, 5), torch.zeros(0, 3), (30, 30)
    )
    assert [len(value) for value in result] == [0] * 5 and result.masks.shape == (0, 5, 5)


def test_one_pixel_results_are_dropped_in_fcis_mode_only():
    boxes, masks, scores = torch.tensor([[3.0, 3, 3, 9]]), torch.ones(1, 5, 5), torch.ones(1, 1)
    counts = {
        mode: len(MaskVoting(mode=mode)(boxes, masks, scores, (30, 30)).seeds)
        for mode in ("fcis", "mnc", "crop")
    }
    assert counts == {"fcis": 0, "mnc": 1, "crop": 1}
    assert "mode='mnc'" in repr(MaskVoting(mode="mnc"))
