"""RoI warping with exact gradients to the features and to the boxes.

Source: Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network Cascades" (MNC),
section 4, and the sampling rules of its Caffe releases.
"""

from typing import Any

import torch
from torch import Tensor, nn

from d2ext.ops._checks import empty_gradient, layout_of
from d2ext.ops._library import define_op
from d2ext.ops.reference import roi_warp as _reference


def _warp_fake(op, input, rois, scale, out_h, out_w, border, bin_reduce="point"):
    _reference.check(op, input, rois, scale, out_h, out_w, border, bin_reduce)
    size = (rois.shape[0], input.shape[1], out_h, out_w)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout_of(input))


def _roi_warp_fake(
    input, rois, spatial_scale, out_h, out_w, *,
    aligned=True, quantize=False, border="clamp_half", bin_reduce="point",
):  # fmt: skip
    return _warp_fake("roi_warp", input, rois, spatial_scale, out_h, out_w, border, bin_reduce)


def _max_pool_fake(
    input, rois, spatial_scale, out_h, out_w, *, aligned=True, quantize=False, border="clamp_half"
):
    return _warp_fake("roi_warp_max_pool", input, rois, spatial_scale, out_h, out_w, border)


def _gradients_fake(op, grad, input, rois, out_h, out_w, need_input, need_rois):
    _reference.check_gradient(op, grad, input, rois, out_h, out_w)
    by_input = empty_gradient(input)
    if need_input:
        by_input = torch.empty(
            input.shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input)
        )
    by_rois = rois.new_empty(rois.shape) if need_rois else empty_gradient(rois)
    return by_input, by_rois


def _roi_warp_backward_fake(
    grad, input, rois, spatial_scale, out_h, out_w,
    aligned, quantize, border, bin_reduce, need_input, need_rois,
):  # fmt: skip
    return _gradients_fake("roi_warp", grad, input, rois, out_h, out_w, need_input, need_rois)


def _max_pool_backward_fake(
    grad, input, rois, spatial_scale, out_h, out_w, aligned, quantize, border, need_input, need_rois
):
    return _gradients_fake(
        "roi_warp_max_pool", grad, input, rois, out_h, out_w, need_input, need_rois
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.arguments = (*inputs[2:], *keyword_only_inputs.values())


def _make_backward(operator):
    def backward(ctx, grad):
        input, rois = ctx.saved_tensors
        need_input, need_rois = ctx.needs_input_grad[:2]
        by_input, by_rois = operator(grad, input, rois, *ctx.arguments, need_input, need_rois)
        return by_input if need_input else None, by_rois if need_rois else None, None, None, None

    return backward


_BACKWARD = (
    "(Tensor grad, Tensor input, Tensor rois, float spatial_scale, SymInt out_h, SymInt out_w,"
)
_NEEDS = " bool need_input, bool need_rois) -> (Tensor, Tensor)"

_roi_warp_backward = define_op(
    "roi_warp_backward",
    f"{_BACKWARD} bool aligned, bool quantize, str border, str bin_reduce,{_NEEDS}",
    reference=_reference.roi_warp_backward,
    fake=_roi_warp_backward_fake,
)
_roi_warp = define_op(
    "roi_warp",
    "(Tensor input, Tensor rois, float spatial_scale, SymInt out_h, SymInt out_w, *,"
    " bool aligned=True, bool quantize=False, str border='clamp_half', str bin_reduce='point')"
    " -> Tensor",
    reference=_reference.roi_warp,
    fake=_roi_warp_fake,
    setup_context=_setup_context,
    backward=_make_backward(_roi_warp_backward),
)
_roi_warp_max_pool_backward = define_op(
    "roi_warp_max_pool_backward",
    f"{_BACKWARD} bool aligned, bool quantize, str border,{_NEEDS}",
    reference=_reference.roi_warp_max_pool_backward,
    fake=_max_pool_backward_fake,
)
_roi_warp_max_pool = define_op(
    "roi_warp_max_pool",
    "(Tensor input, Tensor rois, float spatial_scale, SymInt out_h, SymInt out_w, *,"
    " bool aligned=True, bool quantize=False, str border='clamp_half') -> Tensor",
    reference=_reference.roi_warp_max_pool,
    fake=_max_pool_fake,
    setup_context=_setup_context,
    backward=_make_backward(_roi_warp_max_pool_backward),
)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """`7` -> `(7, 7)`."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def roi_warp(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    *,
    aligned: bool = True,
    quantize: bool = False,
    border: str = "clamp_half",
    bin_reduce: str = "point",
) -> Tensor:
    """Warp regions of a feature map to a fixed size, one bilinear sample per output cell.

    Differentiable in `input` and in `rois`. Along x (y alike), with `a = x1 * spatial_scale`,
    extent `e = max(x2 * spatial_scale - a, 0)` and P output cells, cell p samples at
    `a + e*p/P`, or at `a + e*(p+0.5)/P - 0.5` when `aligned`. Cell j of the map
    lies at coordinate j.

    Args:
        input: (B, C, H, W), float32, float64, float16 or bfloat16, contiguous or channels_last.
        rois: (N, 5), rows of image index, x1, y1, x2, y2 in pixels of the network input; float32,
            or float64 beside a float64 `input`. Without `aligned` corners are inclusive pixel
            indices, as in MNC: subtract 1 from x2 and y2 of detectron2's boxes. A row with a NaN,
            an infinity or
            an index outside `0..B-1` gives zeros.
        output_size: output height and width, each in 1..64.
        spatial_scale: feature cells per pixel, e.g. `1/16`.
        aligned: sample bin centres, half-pixel aligned; this is torchvision's
            `roi_align(aligned=True, sampling_ratio=1)`, with gradients to the boxes. False
            samples the upper left corners of the bins, as MNC does.
        quantize: round scaled corners to whole cells, halves away from zero, as MNC's release does.
            The gradient passes as if nothing was rounded.
        border: "clamp_half" clamps samples up to half a cell outside the map and gives 0 further
            out (release); "zeros" interpolates against zeros around the map (paper).
        bin_reduce: "point", or "edge_max": the maximum over a grid of `ceil(e/P) + 1` samples per
            axis from edge to edge of the bin, samples outside the map left out (MNC's first
            release). At most W (H) sub-steps are taken along x (y).

    Returns:
        (N, C, output height, output width) in the dtype and memory format of `input`.

    Raises:
        RuntimeError: for shapes, dtypes or values outside the ranges above.
    """
    height, width = pair(output_size)
    return _roi_warp(
        input, rois, spatial_scale, height, width,
        aligned=aligned, quantize=quantize, border=border, bin_reduce=bin_reduce,
    )  # fmt: skip


def roi_warp_max_pool(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    *,
    aligned: bool = True,
    quantize: bool = False,
    border: str = "clamp_half",
) -> Tensor:
    """`roi_warp` at twice `output_size`, then 2x2 maximum pooling, in one step.

    Nothing of the doubled size is allocated, forward or backward. The first maximum in row-major
    order takes the whole gradient. `output_size=14, aligned=False, quantize=True` is MNC's RoI
    feature. Arguments and result as `roi_warp`.
    """
    height, width = pair(output_size)
    return _roi_warp_max_pool(
        input, rois, spatial_scale, height, width, aligned=aligned, quantize=quantize, border=border
    )


class RoIWarp(nn.Module):
    """See `roi_warp`; with `max_pool`, `roi_warp_max_pool`."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        *,
        aligned: bool = True,
        quantize: bool = False,
        border: str = "clamp_half",
        bin_reduce: str = "point",
        max_pool: bool = False,
    ) -> None:
        super().__init__()
        if max_pool and bin_reduce != "point":
            raise ValueError("RoIWarp: max_pool needs bin_reduce='point'")
        self.output_size = pair(output_size)
        self.spatial_scale = spatial_scale
        self.aligned = aligned
        self.quantize = quantize
        self.border = border
        self.bin_reduce = bin_reduce
        self.max_pool = max_pool

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(B, C, H, W) and (N, 5) -> (N, C, output height, output width)."""
        options: dict[str, Any] = {"aligned": self.aligned, "quantize": self.quantize}
        options["border"] = self.border
        if self.max_pool:
            return roi_warp_max_pool(input, rois, self.output_size, self.spatial_scale, **options)
        return roi_warp(
            input, rois, self.output_size, self.spatial_scale, bin_reduce=self.bin_reduce, **options
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale},"
            f" aligned={self.aligned}, quantize={self.quantize}, border={self.border!r},"
            f" bin_reduce={self.bin_reduce!r}, max_pool={self.max_pool}"
        )
