"""Which regions train FCIS, and what their masks should be."""

import cv2
import numpy as np
import pytest
import torch

from d2ext.modeling.sampling import image_seeds
from d2ext.structures import to_continuous
from d2ext.utils.testing import random_batch
from fcis.targets import RegionSampler, crop_mask_targets

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, pairwise_iou

K = 3


def make_target(count=2):
    gt = torch.tensor([[10.0, 10, 30, 30], [50, 40, 80, 60]])[:count]
    return Instances((70, 90), gt_boxes=Boxes(gt), gt_classes=torch.tensor([2, 0])[:count])


def make_proposals(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[20.0, 20], [65, 50]]).repeat(count // 2, 1)
    corners = centres + 12 * torch.randn(count, 2, generator=generator)
    return Boxes(torch.cat([corners - 10, corners + 10], dim=1).clamp(0, 70))


def sample(sampler, proposals, target, seed=0):
    with image_seeds([{"sample_seed": seed}]):
        return sampler([proposals], [target], "regions")[0]


def test_a_sample_holds_at_most_its_share_of_positives():
    sampler = RegionSampler(num_classes=K, batch_size_per_image=32, background_iou=0.1)
    regions = sample(sampler, make_proposals(), make_target())
    iou = pairwise_iou(make_target().gt_boxes, regions.proposal_boxes).max(dim=0).values
    assert len(regions) == 32
    assert (regions.gt_classes[:8] < K).all() and (iou[:8] >= 0.5).all()
    assert (regions.gt_classes[8:] == K).all()
    assert ((iou[8:] >= 0.1) & (iou[8:] < 0.5)).all()
    assert len(regions.proposal_boxes.tensor.unique(dim=0)) == 32


def test_a_sample_that_is_too_small_is_filled_up_with_what_was_not_drawn_as_background():
    sampler = RegionSampler(
        num_classes=K, batch_size_per_image=40, background_iou=0.45, positive_fraction=0.05
    )
    proposals = make_proposals(30)
    regions = sample(sampler, proposals, make_target())
    positive = regions.gt_classes < K
    assert len(regions) == 40 and positive.sum() == 2
    drawn = {tuple(b) for b in regions.proposal_boxes.tensor[positive].tolist()}
    others = [tuple(b) for b in regions.proposal_boxes.tensor[~positive].tolist()]
    assert not drawn & set(others)
    # 32 candidates, of which 30 are left: all of them appear, some twice.
    assert len(set(others)) == 30 and len(others) == 38
    iou = pairwise_iou(make_target().gt_boxes, regions.proposal_boxes).max(dim=0).values
    assert (iou[~positive] >= 0.5).any(), "positives that were not drawn become background"
    assert (iou[~positive] < 0.45).any()


def test_samples_depend_on_the_seed_of_the_image_only():
    sampler = RegionSampler(num_classes=K, batch_size_per_image=16)
    first, again, other = (
        sample(sampler, make_proposals(), make_target(), seed).proposal_boxes.tensor
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("size", [-1, 16])
def test_images_without_objects_have_background_only(size):
    sampler = RegionSampler(num_classes=K, batch_size_per_image=size, background_iou=0.1)
    regions = sample(sampler, make_proposals(20), make_target(0))
    assert len(regions) == (20 if size < 0 else 16)
    assert (regions.gt_classes == K).all()


@pytest.mark.parametrize("size", [-1, 16])
def test_images_without_proposals_train_on_their_objects(size):
    sampler = RegionSampler(num_classes=K, batch_size_per_image=size)
    regions = sample(sampler, Boxes(torch.zeros(0, 4)), make_target())
    assert set(regions.gt_classes[:2].tolist()) == {0, 2}
    nothing = sample(sampler, Boxes(torch.zeros(0, 4)), make_target(0))
    assert len(nothing) == 0


# ---------------------------------------------------------------------------------- mask targets


def target_by_opencv(mask, gt_box, box, size):
    """Cut, paste, resize and compare one mask as the release does; boxes are continuous."""
    x1, y1, x2, y2 = np.round(np.asarray(box) - [0, 0, 1, 1]).astype(int)
    gx1, gy1, gx2, gy2 = np.round(np.asarray(gt_box) - [0, 0, 1, 1]).astype(int)
    canvas = np.zeros((y2 - y1 + 1, x2 - x1 + 1), np.float32)
    left, top, right, bottom = max(x1, gx1), max(y1, gy1), min(x2, gx2), min(y2, gy2)
    if left <= right and top <= bottom:
        inside = mask[top : bottom + 1, left : right + 1]
        canvas[top - y1 : bottom + 1 - y1, left - x1 : right + 1 - x1] = inside
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_LINEAR) >= 0.4


@pytest.mark.parametrize("size", [6, 21])
def test_targets_equal_a_crop_resized_by_opencv(size):
    instances = random_batch(1, num_objects=4)[0]["instances"]
    masks, gts = instances.gt_masks, instances.gt_masks.get_bounding_boxes()
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(4).repeat(10)
    boxes = gts.tensor[index] + 6 * torch.randn(40, 4, generator=generator)
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], dim=1)
    boxes[:, 0::2].clamp_(0, 96)
    boxes[:, 1::2].clamp_(0, 64)
    ours = crop_mask_targets(masks, gts, index, boxes, size)
    same = 0
    for row, box in enumerate(boxes):
        mask = masks.tensor[index[row]].float().numpy()
        expected = target_by_opencv(mask, gts.tensor[index[row]], box, size)
        same += int((ours[row].numpy() == expected).sum())
    # OpenCV rounds its weights: values of exactly 0.4 may fall on either side.
    assert same >= 0.999 * ours.numel()
    assert 0.1 < ours.float().mean() < 0.9


def test_a_mask_ends_at_its_box():
    masks = BitMasks(torch.ones(1, 20, 20))
    gt = Boxes(torch.tensor([[5.0, 5, 15, 15]]))
    targets = crop_mask_targets(masks, gt, torch.tensor([0]), torch.tensor([[0.0, 0, 20, 20]]), 20)
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[5:15, 5:15] = True
    assert torch.equal(targets[0], expected)


def test_regions_that_reach_out_of_the_image_are_background_there():
    masks = BitMasks(torch.ones(1, 10, 10))
    gt = Boxes(torch.tensor([[-5.0, -5, 15, 15]]))
    box = to_continuous(torch.tensor([[-5.0, 0, 14, 9]]))
    targets = crop_mask_targets(masks, gt, torch.tensor([0]), box, 20)
    assert targets[0].all(dim=0).tolist() == [False] * 5 + [True] * 10 + [False] * 5


def test_polygons_give_the_targets_of_their_bitmaps():
    polygon = np.array([4.0, 4, 16, 4, 16, 12, 4, 12])
    boxes = torch.tensor([[2.0, 2, 18, 14]])
    gts = Boxes(torch.tensor([[4.0, 4, 16, 12]]))
    index = torch.tensor([0])
    polygons = PolygonMasks([[polygon]])
    bitmaps = BitMasks.from_polygon_masks(polygons, 20, 20)
    ours = crop_mask_targets(polygons, gts, index, boxes, 8)
    assert torch.equal(ours, crop_mask_targets(bitmaps, gts, index, boxes, 8))
    assert ours.any() and not ours.all()


def test_no_regions_give_no_targets():
    masks = BitMasks(torch.ones(0, 10, 10))
    empty = torch.zeros(0, 4)
    targets = crop_mask_targets(masks, Boxes(empty), torch.zeros(0).long(), empty, 21)
    assert targets.shape == (0, 21, 21)
