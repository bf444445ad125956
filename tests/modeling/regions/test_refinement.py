import math

import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.modeling.regions.refinement import ClampedBox2BoxTransform, refine_boxes

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes

WEIGHTS = (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)


def random_boxes(n, seed):
    corners = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) * 50
    extents = 5 + torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 1)) * 40
    return torch.cat([corners, corners + extents], dim=1)


def test_decoding_inverts_encoding():
    transform = ClampedBox2BoxTransform(WEIGHTS)
    source, goal = random_boxes(20, 0), random_boxes(20, 5)
    decoded = transform.apply_deltas(transform.get_deltas(source, goal), source)
    assert torch.allclose(decoded, goal, atol=1e-3)


def test_within_the_limits_it_equals_detectron2():
    deltas = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    boxes = random_boxes(20, 0)
    ours = ClampedBox2BoxTransform(WEIGHTS).apply_deltas(deltas, boxes)
    theirs = Box2BoxTransform(WEIGHTS).apply_deltas(deltas, boxes)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("log_size, factor", [(-10.0, 1 / 62.5), (10.0, 62.5)])
def test_log_sizes_are_limited_on_both_sides(log_size, factor):
    transform = ClampedBox2BoxTransform([2.0, 2.0, 4.0, 5.0])
    deltas = torch.tensor([[0.0, 0.0, 4.0 * log_size, 5.0 * log_size]])
    x1, y1, x2, y2 = transform.apply_deltas(deltas, torch.tensor([[10.0, 20, 30, 60]]))[0]
    assert math.isclose(x2 - x1, 20 * factor, rel_tol=1e-4)
    assert math.isclose(y2 - y1, 40 * factor, rel_tol=1e-4)


def test_offsets_are_not_limited():
    transform = ClampedBox2BoxTransform([1.0, 1.0, 1.0, 1.0])
    box = transform.apply_deltas(
        torch.tensor([[-50.0, 50.0, 0, 0]]), torch.tensor([[0.0, 0, 10, 10]])
    )
    assert box.tolist() == [[-500, 500, -490, 510]]


def test_refined_boxes_are_clipped_to_their_own_image_and_stay_aligned():
    transform = ClampedBox2BoxTransform([1.0, 1.0, 1.0, 1.0])
    boxes = [
        Boxes(torch.tensor([[10.0, 10, 30, 30]])),
        Boxes(torch.zeros(0, 4)),
        Boxes(torch.tensor([[10.0, 10, 30, 30], [0.0, 0, 20, 20]])),
    ]
    deltas = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [-5.0, 0, 0, 0]])
    refined = refine_boxes(boxes, deltas, transform, [(25, 40), (5, 5), (100, 200)])
    assert [b.tensor.tolist() for b in refined] == [
        [[30, 10, 40, 25]],
        [],
        [[30, 10, 50, 30], [0, 0, 0, 20]],
    ]


def test_refined_boxes_are_constants():
    deltas = torch.zeros(1, 4, requires_grad=True)
    boxes = [Boxes(torch.tensor([[10.0, 10, 30, 30]], requires_grad=True))]
    transform = ClampedBox2BoxTransform([1.0, 1.0, 1.0, 1.0])
    (refined,) = refine_boxes(boxes, deltas, transform, [(50, 50)])
    assert not refined.tensor.requires_grad


def test_diverged_deltas_are_reported():
    boxes = [Boxes(torch.tensor([[10.0, 10, 30, 30]]))]
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        refine_boxes(
            boxes,
            torch.full((1, 4), float("nan")),
            ClampedBox2BoxTransform([1.0, 1.0, 1.0, 1.0]),
            [(50, 50)],
        )


def test_not_finite_values_in_bfloat16_are_not_blamed_on_the_learning_rate():
    boxes = [Boxes(torch.tensor([[10.0, 10, 30, 30]]))]
    deltas = torch.full((1, 4), float("nan"), dtype=torch.bfloat16)
    transform = ClampedBox2BoxTransform([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(FloatingPointError, match="Refined boxes .* bfloat16, .*: use float32"):
        refine_boxes(boxes, deltas, transform, [(50, 50)])
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(FloatingPointError, match="bfloat16"),
    ):
        refine_boxes(boxes, deltas.float(), transform, [(50, 50)])
