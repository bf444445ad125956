"""RoI warp: rules at edges and borders, empty inputs, wrong arguments."""

import pytest
import torch

from d2ext.ops import RoIWarp, roi_warp, roi_warp_max_pool

from tests.ops.helpers import reference

# aligned, quantize, border and bin_reduce of the backward operator
DEFAULTS = (True, False, "clamp_half", "point")


def test_first_maximum_takes_the_whole_gradient(impl):
    feature = torch.ones(1, 1, 4, 4)
    rois = torch.tensor([[0.0, 0.0, 0.0, 3.0, 3.0]])
    grad = torch.ones(1, 1, 1, 1)
    by_input, _ = impl.roi_warp_max_pool_backward(
        grad, feature, rois, 1.0, 1, 1, False, False, "clamp_half", True, True
    )
    expected = torch.zeros(4, 4)
    expected[0, 0] = 1
    assert torch.equal(by_input[0, 0], expected)


def test_rounding_sends_halves_away_from_zero(impl):
    ramp = torch.arange(8.0).view(1, 1, 1, 8).repeat(1, 1, 3, 1)
    for x1, cell in ((2.5, 3.0), (1.5, 2.0), (0.5, 1.0), (3.4999998, 3.0)):
        rois = torch.tensor([[0.0, x1, 0.0, x1, 0.0]])
        out = impl.roi_warp(ramp, rois, 1.0, 1, 1, aligned=False, quantize=True)
        assert float(out) == cell
    # -2.5 -> -3, out of the map; -0.4 -> 0
    rois = torch.tensor([[0.0, -2.5, 0.0, 0.5, 0.0], [0.0, -0.4, 0.0, 4.4, 0.0]])
    out = impl.roi_warp(ramp + 1, rois, 1.0, 1, 4, aligned=False, quantize=True)
    assert out.flatten(1).tolist() == [[0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]]


def test_box_at_the_edge_still_gets_a_gradient(impl):
    ramp = torch.arange(8.0).view(1, 1, 1, 8).repeat(1, 1, 3, 1)
    rois = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0]])
    arguments = (ramp, rois, 1.0, 1, 1, False, False, "clamp_half", "point", False, True)
    _, by_rois = impl.roi_warp_backward(torch.ones(1, 1, 1, 1), *arguments)
    assert by_rois.tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("position", "value"),
    [(-0.5, 1.0), (-0.51, 0.0), (7.5, 8.0), (7.51, 0.0), (7.0, 8.0), (-0.25, 1.0)],
)
@pytest.mark.parametrize("along_x", [True, False])
def test_samples_up_to_half_a_cell_outside_count(impl, position, value, along_x):
    ramp = torch.arange(1.0, 9.0).view(1, 1, 1, 8).repeat(1, 1, 8, 1)
    if not along_x:
        ramp = ramp.mT
    x, y = (position, 3.0) if along_x else (3.0, position)
    out = impl.roi_warp(ramp, torch.tensor([[0.0, x, y, x, y]]), 1.0, 1, 1, aligned=False)
    assert float(out) == value


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("border", ["clamp_half", "zeros"])
def test_maps_of_one_row_or_column(impl, shape, border, generator):
    feature = torch.randn(1, 2, *shape, dtype=torch.float64, generator=generator)
    rois = torch.tensor([[0.0, 0.0, 0.0, shape[1], shape[0]]])
    out = impl.roi_warp(feature, rois, 1.0, 3, 3, border=border)
    assert torch.isfinite(out).all() and float(out.abs().max()) > 0
    torch.testing.assert_close(out, reference.roi_warp(feature, rois, 1.0, 3, 3, border=border))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 5), (2, 0, 4, 5)])
def test_nothing_in_gives_nothing_out(impl, shape):
    feature = torch.randn(shape)
    rois = torch.zeros(0, 5)
    out = impl.roi_warp(feature, rois, 1.0, 3, 2)
    assert out.shape == (0, shape[1], 3, 2)
    grads = impl.roi_warp_backward(out, feature, rois, 1.0, 3, 2, *DEFAULTS, True, True)
    assert grads[0].shape == shape and not grads[0].any()
    assert grads[1].shape == (0, 5)


def test_empty_batch_gives_zeros(impl):
    feature, rois = torch.randn(0, 3, 4, 5), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
    out = impl.roi_warp(feature, rois, 1.0, 3, 2)
    assert out.shape == (1, 3, 3, 2) and not out.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(3, 4, 5)}, "input must have 4 dimensions, got 3"),
        ({"input": torch.zeros(1, 3, 4, 5, dtype=torch.int64)}, "input must be float32"),
        ({"rois": torch.zeros(2, 4)}, r"rois must have shape \(N, 5\)"),
        ({"rois": torch.zeros(2, 5).half()}, "half precision cannot hold pixel coordinates"),
        ({"rois": torch.zeros(2, 5).double()}, "rois must be float32"),
        ({"output_size": 0}, "output size must lie in 1..64"),
        ({"output_size": (7, 65)}, "output size must lie in 1..64"),
        ({"spatial_scale": 0.0}, "spatial_scale must be positive"),
        ({"border": "reflect"}, "border must be one of clamp_half, zeros"),
        ({"bin_reduce": "mean"}, "bin_reduce must be one of point, edge_max"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "input": torch.zeros(1, 3, 4, 5),
        "rois": torch.zeros(2, 5),
        "output_size": 7,
        "spatial_scale": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        roi_warp(**(arguments | change))


def test_wrong_gradient_shape_is_refused(impl):
    feature, rois = torch.zeros(1, 3, 4, 5), torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match="grad must have shape"):
        impl.roi_warp_backward(
            torch.zeros(2, 3, 2, 3), feature, rois, 1.0, 2, 2, *DEFAULTS, True, True
        )


def test_second_derivative_is_refused():
    feature = torch.randn(1, 3, 4, 5, requires_grad=True)
    out = roi_warp(feature, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 2, 1.0)
    (first,) = torch.autograd.grad((out**2).sum(), feature, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        first.sum().backward()


def test_module_runs_the_operator_it_prints(generator):
    feature, rois = torch.randn(1, 3, 4, 5), torch.tensor([[0.0, 0.0, 0.0, 3.0, 2.0]])
    module = RoIWarp(2, 1.0, aligned=False, quantize=True, border="zeros")
    expected = roi_warp(feature, rois, 2, 1.0, aligned=False, quantize=True, border="zeros")
    assert torch.equal(module(feature, rois), expected)
    pooled = RoIWarp((2, 1), 1.0, max_pool=True)
    assert torch.equal(pooled(feature, rois), roi_warp_max_pool(feature, rois, (2, 1), 1.0))
    assert "border='zeros'" in repr(module) and "output_size=(2, 1)" in repr(pooled)
    with pytest.raises(ValueError, match="max_pool needs"):
        RoIWarp(2, 1.0, max_pool=True, bin_reduce="edge_max")
