import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.modeling.regions.sampling import (
    ProposalSampler,
    best_matches,
    image_generator,
    image_seeds,
    share_ranks,
)

from detectron2.structures import Boxes, Instances


def target(boxes, classes):
    return Instances(
        (100, 100),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])  # noqa: E731
    return inter / (area(a) + area(b) - inter)


def assign_by_loops(boxes, gts, threshold, reassign):
    """(matched row, positive) per box, after MMDetection's description of MaxIoUAssigner."""
    index, positive = [], []
    for box in boxes:
        values = [iou(box, gt) for gt in gts]
        best = max(range(len(gts)), key=lambda g: values[g])
        index.append(best)
        positive.append(values[best] >= threshold)
    if reassign:
        for g, gt in enumerate(gts):
            values = [iou(box, gt) for box in boxes]
            if max(values) >= threshold:
                for i, value in enumerate(values):
                    if value == max(values):
                        index[i] = g
    return index, positive


# Integer corners, so that equal IoUs are equal in any arithmetic.
CROWD = [[0, 0, 40, 40], [4, 0, 44, 40], [8, 4, 48, 44], [60, 60, 90, 90]]


@pytest.mark.parametrize("reassign", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_assignment_follows_the_rules_in_a_crowded_scene(reassign, threshold):
    generator = torch.Generator().manual_seed(1)
    gts = torch.tensor(CROWD, dtype=torch.float32)
    noise = torch.randint(-6, 7, (40, 4), generator=generator)
    boxes = gts[torch.randint(4, (40,), generator=generator)] + noise
    sampler = ProposalSampler(num_classes=3, iou_threshold=threshold, reassign_low_quality=reassign)
    index, positive = sampler.assign(boxes, gts)
    expected_index, expected_positive = assign_by_loops(
        boxes.tolist(), gts.tolist(), threshold, reassign
    )
    assert positive.tolist() == expected_positive
    assert 0 < positive.sum() < 40
    assert index[positive].tolist() == [i for i, p in zip(expected_index, expected_positive) if p]


@pytest.mark.parametrize("reassign, winner", [(False, 0), (True, 1)])
def test_box_between_two_objects_goes_to_the_later_one_only_with_reassignment(reassign, winner):
    gts = torch.tensor([[0.0, 0, 40, 40], [10, 0, 50, 40]])
    box = torch.tensor([[3.0, 0, 43, 40]])  # IoU 37/43 with the first, 33/47 with the second
    sampler = ProposalSampler(num_classes=3, iou_threshold=0.5, reassign_low_quality=reassign)
    index, positive = sampler.assign(box, gts)
    assert index.tolist() == [winner] and positive.tolist() == [True]


def test_reassignment_makes_no_box_positive_that_was_not():
    gts = torch.tensor([[0.0, 0, 40, 40], [50, 50, 90, 90]])
    box = torch.tensor([[60.0, 60, 100, 100]])  # best for the second object, IoU 0.39
    sampler = ProposalSampler(num_classes=3, iou_threshold=0.5, reassign_low_quality=True)
    assert sampler.assign(box, gts)[1].tolist() == [False]


def test_best_matches_knows_no_claims_without_ground_truth_or_boxes():
    assert best_matches(torch.zeros(0, 3), 0.3).tolist() == [-1, -1, -1]
    assert best_matches(torch.zeros(2, 0), 0.3).tolist() == []


def test_sampled_fields_describe_the_matched_objects():
    gts, classes = [[0, 0, 40, 40], [50, 50, 90, 90]], [2, 0]
    boxes = Boxes(torch.tensor([[50.0, 50, 88, 90], [0, 60, 20, 80], [1, 0, 40, 40]]))
    sampler = ProposalSampler(num_classes=3, iou_threshold=0.5)
    (result,) = sampler([boxes], [target(gts, classes)], "test")
    assert result.image_size == (100, 100)
    assert result.gt_classes.tolist() == [2, 0, 0, 2, 3]
    assert result.gt_index[:4].tolist() == [0, 1, 1, 0]
    assert result.is_gt.tolist() == [True, True, False, False, False]
    expected = [gts[0], gts[1], [50, 50, 88, 90], [1, 0, 40, 40], [0, 60, 20, 80]]
    assert result.proposal_boxes.tensor.tolist() == expected
    assert result.gt_boxes.tensor[:4].tolist() == [gts[0], gts[1], gts[1], gts[0]]


def test_ground_truth_without_area_is_not_appended():
    gt = target([[10, 10, 10, 30], [20, 20, 40, 40]], [0, 1])
    sampler = ProposalSampler(num_classes=2, iou_threshold=0.5)
    (sample,) = sampler([Boxes(torch.tensor([[10.0, 10, 20, 30]]))], [gt], "stage0")
    assert sample.proposal_boxes.tensor.tolist() == [[20, 20, 40, 40], [10, 10, 20, 30]]
    assert sample.gt_classes.tolist() == [1, 2] and sample.is_gt.tolist() == [True, False]


def test_appended_ground_truth_keeps_its_own_label_where_two_objects_coincide():
    gts = [[0, 0, 40, 40], [0, 0, 40, 40]]
    sampler = ProposalSampler(num_classes=3, iou_threshold=0.5)
    (result,) = sampler([Boxes(torch.zeros(0, 4))], [target(gts, [1, 2])], "test")
    assert result.gt_classes.tolist() == [1, 2]
    assert result.gt_index.tolist() == [0, 1]


@pytest.mark.parametrize("num_boxes", [0, 3])
@pytest.mark.parametrize("num_gt", [0, 1])
@pytest.mark.parametrize("append_gt", [False, True])
def test_zero_boxes_and_zero_ground_truths_give_complete_fields(num_boxes, num_gt, append_gt):
    boxes = Boxes(torch.tensor([[50.0, 50, 60, 60]]).repeat(num_boxes, 1))
    gt = target([[0, 0, 40, 40]] * num_gt, [1] * num_gt)
    sampler = ProposalSampler(
        num_classes=3, iou_threshold=0.5, append_gt=append_gt, reassign_low_quality=True
    )
    (result,) = sampler([boxes], [gt], "test")
    assert len(result) == num_boxes + num_gt * append_gt
    assert result.gt_boxes.tensor.shape == (len(result), 4)
    assert (result.gt_classes == 3).sum() == num_boxes
    assert result.is_gt.sum() == num_gt * append_gt


@pytest.mark.parametrize(
    "size, fraction, num_positive, num_negative",
    [(20, 0.25, 5, 15), (20, 0.75, 10, 10), (60, 0.25, 10, 30), (-1, 0.25, 10, 30)],
)
def test_sample_sizes_respect_the_share_of_positives(size, fraction, num_positive, num_negative):
    pos, neg = share_ranks(10, 30, size, fraction)
    assert (len(pos), len(neg)) == (num_positive, num_negative)
    assert set(pos) <= set(range(10)) and set(neg) <= set(range(30))
    for ranks in (pos, neg):
        assert len(set(ranks)) == len(ranks) and ranks.tolist() == sorted(ranks)


def test_every_candidate_is_drawn_equally_often():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[share_ranks(0, 10, 3, 0.5, generator)[1]] += 1
    # binomial(2000, 0.3): standard deviation 20.5
    assert ((counts - 600).abs() < 90).all()


def test_generator_depends_on_seed_and_tag_but_not_on_the_position_in_the_batch():
    def draws(seeds, image, tag):
        with image_seeds([{"sample_seed": s} for s in seeds]):
            return torch.rand(4, generator=image_generator(image, tag)).tolist()

    assert draws([7, 8], 0, "rpn") == draws([9, 7], 1, "rpn")
    assert draws([7, 8], 0, "rpn") != draws([7, 8], 1, "rpn")
    assert draws([7, 8], 0, "rpn") != draws([7, 8], 0, "stage0_box")
    assert draws([2**63 - 1], 0, "rpn") != draws([2**63 - 2], 0, "rpn")


def test_without_seed_the_global_generator_is_used():
    assert image_generator(0, "rpn") is None
    with image_seeds([{}, {"sample_seed": 3}]):
        assert image_generator(0, "rpn") is None
        assert image_generator(1, "rpn") is not None
    assert image_generator(1, "rpn") is None


def test_seeded_sampling_ignores_the_global_generator():
    boxes = Boxes(torch.rand(50, 4).sort(dim=1).values * 100)
    sampler = ProposalSampler(num_classes=3, iou_threshold=0.5, batch_size_per_image=8)

    def run(seed):
        torch.rand(5)
        with image_seeds([{"sample_seed": seed}]):
            (result,) = sampler([boxes], [target([[0, 0, 40, 40]], [1])], "stage0_box")
        return result.proposal_boxes.tensor.tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)
