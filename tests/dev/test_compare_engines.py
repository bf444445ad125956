"""dev/compare_engines.py: what differs between two engines, and whether rounding explains it."""

import pytest
import torch
from torch import nn

from detectron2.structures import Boxes, Instances

SIZE = (4, 60)
STEP = 2.0**-24  # unit in the last place below 0.5


class Model(nn.Module):
    """Detections whose scores reach 0.5, each 40 pixels large, and the last of them, whose value
    is `pixel`, only from 0.5 on."""

    def __init__(self, *scores, pixel=1.0):
        super().__init__()
        self.layer = nn.Identity()
        self.values = torch.tensor([*scores, pixel])

    def forward(self, batched_inputs):
        values = self.layer(self.values)
        scores, pixel = values[:-1], values[-1]
        rows = (scores >= 0.5).nonzero()[:, 0]
        corners = torch.tensor([0.0, 0.0, 10.0, 4.0]).repeat(len(rows), 1)
        corners[:, ::2] += 15.0 * rows[:, None]
        masks = torch.zeros(len(rows), *SIZE, dtype=torch.bool)
        for mask, box in zip(masks, corners.int().tolist()):
            mask[:, box[0] : box[2]] = True
            mask[-1, box[2] - 1] = bool(pixel >= 0.5)
        found = Instances(SIZE, pred_boxes=Boxes(corners), scores=scores[rows], pred_masks=masks)
        found.pred_classes = torch.zeros(len(rows), dtype=torch.int64)
        return [{"instances": found} for _ in batched_inputs]


def compared(script, model, other):
    return script.compare(model, other, [{}])


def test_engines_that_find_the_same_differ_in_nothing(script):
    result = compared(script, Model(0.9, 0.7), Model(0.9, 0.70005))
    assert (result.images, result.detections, result.differing, result.itself) == (1, 2, 0, 0)
    assert result.score == pytest.approx(5e-5, rel=1e-2) and result.iou == result.overlap == 1


@pytest.mark.parametrize("side", [1, -1])
def test_a_detection_at_a_threshold_is_decided_by_rounding(side, script):
    model, other = Model(0.9, 0.5 + side * STEP), Model(0.9, 0.5 - side * STEP)
    result = compared(script, model, other)
    assert (result.missing, result.extra) == ((1, 0) if side > 0 else (0, 1))
    assert (result.differing, result.unexplained) == (1, 0)


@pytest.mark.parametrize("side", [1, -1])
def test_a_detection_away_from_thresholds_is_not(side, script):
    model, other = Model(0.9, 0.5 + side * 1e-5), Model(0.9, 0.5 - side * 1e-5)
    result = compared(script, model, other)
    assert (result.differing, result.unexplained, result.itself) == (1, 1, 0)


def test_a_pixel_at_a_threshold_is_decided_by_rounding_and_others_are_not(script):
    near = compared(script, Model(0.9, pixel=0.5), Model(0.9, pixel=0.5 - STEP))
    far = compared(script, Model(0.9, pixel=0.50001), Model(0.9, pixel=0.4999))
    for result in (near, far):
        assert (result.missing, result.extra, result.differing) == (0, 0, 1)
        assert result.iou == 39 / 40
    assert (near.unexplained, far.unexplained) == (0, 1)


def test_of_two_differing_detections_each_is_explained_by_itself(script):
    model, other = Model(0.5, 0.6), Model(0.5 - STEP, 0.4)
    x, (wanted, found) = {}, (m([{}])[0]["instances"] for m in (model, other))
    rest = script.unexplained(model, x, found, wanted, most=20)
    assert (rest.lost, rest.foreign, rest.runs) == ({1}, set(), 20)
    result = compared(script, model, other)
    assert (result.differing, result.unexplained) == (2, 1)


def test_partners_too_far_apart_differ(script):
    result = compared(script, Model(0.9, 0.7), Model(0.9, 0.701))
    assert (result.missing, result.differing, result.unexplained) == (0, 1, 1)


def test_rounding_is_moved_by_so_many_units_at_most_and_only_within(script):
    layer, x = nn.Sequential(nn.Identity()), torch.linspace(1, 2, 1001)[:-1]
    with script.moved_rounding(layer, 0, 2), torch.no_grad():
        moved, again = layer(x), layer(x)
        assert layer(torch.arange(3)).tolist() == [0, 1, 2]
    units = (moved.double() - x.double()).abs() / 2.0**-23
    # 2 units of the number 1 are almost 4 of numbers just below 2.
    assert 1 < units.max() < 4.5 and not torch.equal(moved, again)
    assert torch.equal(layer(x), x)
