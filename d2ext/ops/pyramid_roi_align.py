"""RoI align over all levels of a feature pyramid in one call.

Sources: He et al., "Mask R-CNN", section 3 (RoIAlign); Lin et al., "Feature Pyramid Networks for
Object Detection", equation 1 (the level of a box).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2ext.ops._checks import channels_last, layout_of
from d2ext.ops._library import define_op
from d2ext.ops.reference import pyramid_roi_align as _reference
from d2ext.ops.roi_warp import pair


def _fake(
    features, rois, scales, out_h, out_w, *,
    sampling_ratio=0, average=1, canonical_size=224.0, canonical_level=4,
):  # fmt: skip
    _reference.check(
        "pyramid_roi_align", features, rois, scales, out_h, out_w, sampling_ratio, average,
        canonical_size,
    )  # fmt: skip
    first = features[0]
    size = (rois.shape[0], first.shape[1], out_h, out_w)
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=layout_of(first))


def _backward_fake(
    grad, rois, sizes, scales, channels_last, sampling_ratio, average, canonical_size,
    canonical_level,
):  # fmt: skip
    _reference.check_gradient(
        "pyramid_roi_align_backward", grad, rois, sizes, scales, sampling_ratio, average,
        canonical_size,
    )  # fmt: skip
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty(
            (*sizes[:2], height, width), dtype=grad.dtype, device=grad.device, memory_format=layout
        )
        for height, width in zip(sizes[2::2], sizes[3::2], strict=True)
    ]


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    features, rois, ctx.scales = inputs[:3]
    ctx.save_for_backward(rois)
    ctx.sizes = [*features[0].shape[:2], *(n for f in features for n in f.shape[2:])]
    ctx.channels_last = channels_last(features[0])
    ctx.options = tuple(keyword_only_inputs.values())


def _backward(ctx, grad):
    (rois,) = ctx.saved_tensors
    gradients = _pyramid_roi_align_backward(
        grad, rois, ctx.sizes, ctx.scales, ctx.channels_last, *ctx.options
    )
    return gradients, None, None, None, None


_pyramid_roi_align_backward = define_op(
    "pyramid_roi_align_backward",
    "(Tensor grad, Tensor rois, SymInt[] sizes, float[] scales, bool channels_last,"
    " int sampling_ratio, int average, float canonical_size, int canonical_level) -> Tensor[]",
    reference=_reference.pyramid_roi_align_backward,
    fake=_backward_fake,
)
_pyramid_roi_align = define_op(
    "pyramid_roi_align",
    "(Tensor[] features, Tensor rois, float[] scales, SymInt out_h, SymInt out_w, *,"
    " int sampling_ratio=0, int average=1, float canonical_size=224., int canonical_level=4)"
    " -> Tensor",
    reference=_reference.pyramid_roi_align,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def pyramid_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    *,
    sampling_ratio: int = 0,
    average: int = 1,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Tensor:
    """RoI align, half-pixel aligned, of every box from the level that fits its size.

    The result is detectron2's `ROIPooler` with `ROIAlignV2`, up to rounding; a single level is
    torchvision's `roi_align(aligned=True)`. Differentiable in `features`, not in `rois`.

    Args:
        features: one to eight levels (B, C, H, W), the finest first, of equal B and C; float32,
            float64, float16 or bfloat16, contiguous or channels_last.
        rois: (N, 5), rows of image index, x1, y1, x2, y2 in pixels of the network input; float32,
            or float64 beside float64 features. A row with a NaN, an infinity or an index outside
            `0..B-1` gives zeros, and among several levels one of negative area too.
        output_size: output height and width.
        scales: feature cells per pixel of each level; of several levels powers of two, each half
            of the one before.
        sampling_ratio: samples per bin and axis, at most 64; 0 takes `ceil(bin size in cells)`.
        average: pool this many times finer and average, in one step: `average=2` is the pooling
            of twice `output_size` followed by 2x2 average pooling. Output sizes times `average`
            lie in 1..256.
        canonical_size, canonical_level: a square box of `canonical_size` pixels is read from the
            level with scale `2**-canonical_level`.

    Returns:
        (N, C, output height, output width) in the dtype and memory format of the first level.

    Raises:
        RuntimeError: for shapes, dtypes or values outside the ranges above.
    """
    height, width = pair(output_size)
    return _pyramid_roi_align(
        list(features), rois, list(scales), height, width,
        sampling_ratio=sampling_ratio, average=average,
        canonical_size=canonical_size, canonical_level=canonical_level,
    )  # fmt: skip
