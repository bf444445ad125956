"""Rows of several images at once are those of each image by itself."""

import numpy as np
import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.modeling.regions.batching import (
    Candidates,
    Draw,
    pad,
    pad_targets,
    pairwise_ious,
    true_rows,
)
from d2ext.modeling.regions.samples import Samples, positive_rows
from d2ext.utils.testing import count_operators

from detectron2.structures import Boxes, Instances, pairwise_iou


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=generator) * 50
    return torch.cat([low, low + 40 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def test_ious_are_the_numbers_of_detectron2():
    first, second = random_boxes(3, 6), random_boxes(3, 40, seed=1)
    first[0, 2] = second[0, 5] = 7.0  # without area
    found = pairwise_ious(first, second)
    for image in range(3):
        expected = pairwise_iou(Boxes(first[image]), Boxes(second[image]))
        assert torch.equal(found[image], expected) and (expected > 0).any()


def test_rows_are_filled_up_with_zeros_and_keep_their_gradient():
    rows = [torch.ones(n, 2, requires_grad=True) for n in (2, 0, 3)]
    padded = pad(rows)
    assert padded[..., 0].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    (padded * torch.arange(18.0).view(3, 3, 2)).sum().backward()
    assert rows[0].grad.tolist() == [[0, 1], [2, 3]] and rows[2].grad[0].tolist() == [12, 13]
    assert pad([torch.zeros(0, 4)]).shape == (1, 1, 4)


def test_targets_say_which_objects_exist():
    targets = [
        Instances((9, 9), gt_boxes=Boxes(random_boxes(n)), gt_classes=torch.arange(n) + 1)
        for n in (2, 0)
    ]
    gt = pad_targets(targets)
    assert gt.present.tolist() == [[True, True], [False, False]]
    assert gt.classes.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("num_rows", [1, 17])
def test_the_host_names_candidates_by_their_number(num_rows):
    masks = torch.rand(3, 2, num_rows, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[1] = False
    with count_operators() as counts:
        candidates = Candidates(masks)
        drawn = [Draw.of(*map(np.arange, counts)) for counts in candidates.counts]
        rows = candidates.rows(drawn)
    assert sum(counts.syncs.values()) == 1
    expected = [
        image * num_rows + masks[image, mask].nonzero()[:, 0]
        for image in range(3)
        for mask in range(2)
    ]
    assert rows.tolist() == torch.cat(expected).tolist()
    assert [d.num_positive for d in drawn] == masks[:, 0].sum(dim=1).tolist()


def test_a_draw_may_jump_between_masks():
    masks = torch.tensor([[[False, True, True], [True, False, False]]])
    draw = Draw(np.array([0, 1, 0]), np.array([1, 0, 0]), 1)
    assert Candidates(masks).rows([draw]).tolist() == [2, 0, 1]


def test_true_rows_are_found_without_asking():
    mask = torch.tensor([False, True, False, True, True])
    with count_operators() as counts:
        rows = true_rows(mask, 3)
    assert rows.tolist() == [1, 3, 4] and not counts.syncs
    assert true_rows(mask, 0).shape == (0,)


def test_positives_are_those_with_a_class_whether_the_host_knows_their_number_or_not():
    classes = [torch.tensor([0, 1, 3]), torch.tensor([3, 3]), torch.tensor([2, 3])]
    plain = [Instances((9, 9), gt_classes=c) for c in classes]
    known = [Samples((9, 9), n, gt_classes=c) for c, n in zip(classes, (2, 0, 1))]
    for samples in (plain, known):
        with count_operators() as counts:
            rows, numbers = positive_rows(samples, 3)
        assert rows.tolist() == [0, 1, 5] and numbers == [2, 0, 1]
        assert bool(counts.syncs) == (samples is plain)
