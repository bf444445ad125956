"""Position-sensitive RoI assembly and its mean.

Source: Li et al., "Fully Convolutional Instance-aware Semantic Segmentation" (FCIS), section 2,
with the bin rule of its release.
"""

import torch
from torch import Tensor

from d2ext.ops._checks import layout_of
from d2ext.ops._library import define_op
from d2ext.ops.reference import ps_roi as _reference


def _assemble_fake(input, rois, spatial_scale, group_size, out_size, *, inclusive=False):
    _reference.check("ps_roi_assemble", input, rois, spatial_scale, group_size, out_size)
    size = (rois.shape[0], input.shape[1] // (group_size * group_size), out_size, out_size)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout_of(input))


def _assemble_backward_fake(grad, rois, spatial_scale, group_size, input_size, inclusive):
    return grad.new_empty(input_size)


def _mean_fake(input, rois, spatial_scale, group_size, out_size, *, inclusive=False):
    _reference.check("ps_roi_mean", input, rois, spatial_scale, group_size, out_size)
    return input.new_empty((rois.shape[0], input.shape[1] // (group_size * group_size)))


def _mean_backward_fake(grad, rois, scale, group_size, out_size, input_size, inclusive):
    return grad.new_empty(input_size)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    input, rois, ctx.spatial_scale, ctx.group_size, ctx.out_size = inputs
    ctx.save_for_backward(rois)
    ctx.input_size = input.shape
    ctx.options = tuple(keyword_only_inputs.values())


def _assemble_backward(ctx, grad):
    (rois,) = ctx.saved_tensors
    by_input = _ps_roi_assemble_backward(
        grad, rois, ctx.spatial_scale, ctx.group_size, ctx.input_size, *ctx.options
    )
    return by_input, None, None, None, None


def _mean_backward(ctx, grad):
    (rois,) = ctx.saved_tensors
    by_input = _ps_roi_mean_backward(
        grad, rois, ctx.spatial_scale, ctx.group_size, ctx.out_size, ctx.input_size, *ctx.options
    )
    return by_input, None, None, None, None


_FORWARD = (
    "(Tensor input, Tensor rois, float spatial_scale, int group_size, int out_size, *,"
    " bool inclusive=False) -> Tensor"
)
_ps_roi_assemble_backward = define_op(
    "ps_roi_assemble_backward",
    "(Tensor grad, Tensor rois, float spatial_scale, int group_size, SymInt[] input_size,"
    " bool inclusive) -> Tensor",
    reference=_reference.ps_roi_assemble_backward,
    fake=_assemble_backward_fake,
)
_ps_roi_assemble = define_op(
    "ps_roi_assemble",
    _FORWARD,
    reference=_reference.ps_roi_assemble,
    fake=_assemble_fake,
    setup_context=_setup_context,
    backward=_assemble_backward,
)
_ps_roi_mean_backward = define_op(
    "ps_roi_mean_backward",
    "(Tensor grad, Tensor rois, float spatial_scale, int group_size, int out_size,"
    " SymInt[] input_size, bool inclusive) -> Tensor",
    reference=_reference.ps_roi_mean_backward,
    fake=_mean_backward_fake,
)
_ps_roi_mean = define_op(
    "ps_roi_mean",
    _FORWARD,
    reference=_reference.ps_roi_mean,
    fake=_mean_fake,
    setup_context=_setup_context,
    backward=_mean_backward,
)


def ps_roi_assemble(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    group_size: int,
    out_size: int,
    *,
    inclusive: bool = False,
) -> Tensor:
    """Assemble position-sensitive score maps inside regions.

    Output cell (i, j) of map d averages channel `(d*k + i*k//P)*k + j*k//P` over all cells its
    bin touches (k = `group_size`, P = `out_size`); bins outside the map give 0. No gradient
    flows to `rois`. Bounds are computed in float32 whatever the dtype of `input`.

    Args:
        input: (B, D*k*k, H, W), floating.
        rois: (N, 5), rows of image index, x1, y1, x2, y2 in pixels of the network input; float32,
            or float64 beside a float64 `input`. Rows with a NaN, an infinity or an index outside
            `0..B-1` give zeros.
        spatial_scale: feature cells per pixel.
        group_size: parts per side, k.
        out_size: P, with `k <= P <= 128`.
        inclusive: corners are inclusive pixel indices, rounded half away from zero, and the end is
            moved by one before scaling: FCIS' release. detectron2's boxes need x2 - 1, y2 - 1 then.

    Returns:
        (N, D, P, P) in the dtype and memory format of `input`.
    """
    return _ps_roi_assemble(input, rois, spatial_scale, group_size, out_size, inclusive=inclusive)


def ps_roi_mean(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    group_size: int,
    out_size: int,
    *,
    inclusive: bool = False,
) -> Tensor:
    """Mean of `ps_roi_assemble` over its P*P cells: (N, D). FCIS' box branch."""
    return _ps_roi_mean(input, rois, spatial_scale, group_size, out_size, inclusive=inclusive)
