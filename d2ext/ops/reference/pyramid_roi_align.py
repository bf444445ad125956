"""Pyramid RoI align in plain PyTorch: the implementation without a compiled kernel, and the oracle.

The samples of a box form a grid, so its bins are `rows @ map @ columns` with one dense matrix of
weights per axis. A map with a NaN or an infinity thus spoils all boxes of its image.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from d2ext.ops._checks import (
    accumulate_type,
    check_coordinates,
    check_floating,
    check_scale,
    layout_of,
    require,
)
from d2ext.ops.reference.roi_warp import valid_rois

_CHUNK_ELEMENTS = 1 << 23
_MANY = 1 << 30
MAX_ALIGN_SIZE = 256
MAX_LEVELS = 8
MAX_SAMPLING = 64


def pyramid_levels(
    rois: Tensor, scales: Sequence[float], canonical_size: float, canonical_level: int
) -> Tensor:
    """(N,) int64 index of the level of every row, -1 where it has none.

    detectron2's `assign_boxes_to_levels`, operation by operation. A single level takes all rows;
    of several, none takes a box of negative area or with a NaN.
    """
    if len(scales) == 1:
        return torch.zeros(len(rois), dtype=torch.int64, device=rois.device)
    first = round(-math.log2(scales[0]))
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    level = torch.floor(canonical_level + torch.log2(area.sqrt() / canonical_size + 1e-8))
    level = level.clamp(first, first + len(scales) - 1) - first
    return level.nan_to_num(-1.0).long()


def _axis_weights(
    low: Tensor, high: Tensor, scale: float, length: int, bins: int, sampling: int, average: int
) -> Tensor:
    """Weights (n, bins, length) of the cells along one axis; box ends (n,) in pixels."""
    start = low * scale - 0.5
    extent = (high * scale - 0.5) - start
    size = extent / (bins * average)
    count = size.ceil().nan_to_num(0.0).clamp(0, _MANY)
    if sampling > 0:
        count = torch.full_like(count, sampling)
    count = torch.where(extent.isfinite(), count, torch.zeros_like(count)).long()
    start, size, count = start[:, None], size[:, None], count[:, None]
    fine = torch.arange(bins * average, device=low.device)[None]
    # samples that may lie in the map
    step = (size.double() / count.clamp(min=1)).nan_to_num(0.0)
    base = (start.double() + size.double() * fine).nan_to_num(0.0)
    ends = torch.stack([(-1.0 - base) / step, (length - base) / step])
    first = (ends.amin(0) - 3.0).nan_to_num(0.0).clamp(0, _MANY).long()
    last = (ends.amax(0) + 3.0).nan_to_num(_MANY).clamp(0, _MANY).long()
    first = torch.where(step == 0, torch.zeros_like(first), torch.minimum(first, count))
    last = torch.where(step == 0, count, torch.minimum(last, count))
    most = int((last - first).max()) if last.numel() else 0
    sub = first[:, :, None] + torch.arange(max(most, 0), device=low.device)
    exists = sub < last[:, :, None]
    inside = (sub.to(low.dtype) + 0.5) * size[:, :, None] / count.clamp(min=1)[:, :, None]
    position = (start + fine.to(low.dtype) * size)[:, :, None] + inside
    valid = exists & (position >= -1) & (position <= length)
    position = torch.where(valid, position, torch.zeros_like(position)).clamp(min=0)
    cell = position.long()
    share = valid.to(low.dtype) / (count.clamp(min=1) * average)[:, :, None].to(low.dtype)
    upper = torch.where(cell < length - 1, position - cell, torch.zeros_like(position))
    weights = low.new_zeros(len(low), bins, length)
    for place, weight in ((cell, 1 - upper), (cell + 1, upper)):
        place = place.clamp(max=length - 1)
        shape = (len(low), bins, -1) if place.numel() else (len(low), bins, 0)
        weights.scatter_add_(2, place.reshape(shape), (weight * share).reshape(shape))
    return weights


class _Pooling:
    """Boxes in chunks of one image and level, with their weights."""

    def __init__(self, rois, batch, scales, size, sampling, average, canonical) -> None:
        self.rois, self.batch, self.scales, self.size = rois, batch, scales, size
        self.sampling, self.average = sampling, average
        alive = valid_rois(rois, batch)
        levels = pyramid_levels(rois, scales, *canonical)
        self.level = torch.where(alive, levels, torch.full_like(levels, -1))

    def chunks(
        self, level: int, channels: int, height: int, width: int, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yields image, numbers of rows, and their weights along y and x."""
        if not (channels and height and width):
            return
        chunk = max(1, _CHUNK_ELEMENTS // (channels * height * self.size[1]))
        for image in range(self.batch):
            chosen = (self.level == level) & (self.rois[:, 0].long() == image)
            for rows in chosen.nonzero()[:, 0].split(chunk):
                if len(rows):
                    boxes, scale = self.rois[rows, 1:].to(dtype), self.scales[level]
                    y = _axis_weights(
                        boxes[:, 1], boxes[:, 3], scale, height, self.size[0], self.sampling,
                        self.average,
                    )  # fmt: skip
                    x = _axis_weights(
                        boxes[:, 0], boxes[:, 2], scale, width, self.size[1], self.sampling,
                        self.average,
                    )  # fmt: skip
                    yield image, rows, y, x


def _check(op, rois, like, levels, scales, out_h, out_w, sampling, average, canonical_size) -> None:
    require(
        1 <= levels <= MAX_LEVELS and levels == len(scales),
        f"{op}: 1..{MAX_LEVELS} feature levels with a scale each are needed",
    )
    for i, scale in enumerate(scales):
        check_scale(op, scale)
        require(
            i == 0 or scale * 2 == scales[i - 1],
            f"{op}: every scale must be half of the one before",
        )
    require(
        len(scales) == 1 or 2.0 ** round(math.log2(scales[0])) == scales[0],
        f"{op}: scales of several levels must be powers of two",
    )
    check_coordinates(op, "rois", rois, 5, like)
    require(average >= 1, f"{op}: output size times average must lie in 1..{MAX_ALIGN_SIZE}")
    for size in (out_h, out_w):
        require(
            size >= 1 and size * average <= MAX_ALIGN_SIZE,
            f"{op}: output size times average must lie in 1..{MAX_ALIGN_SIZE}",
        )
    require(
        0 <= sampling <= MAX_SAMPLING,
        f"{op}: sampling_ratio must lie in 0..{MAX_SAMPLING}",
    )
    require(
        0 < canonical_size < float("inf"),
        f"{op}: canonical_size must be positive and finite",
    )


def check(
    op, features, rois, scales, out_h, out_w, sampling_ratio, average, canonical_size
) -> None:
    require(len(features) > 0, f"{op}: features must not be empty")
    like = features[0]
    _check(
        op, rois, like, len(features), scales, out_h, out_w, sampling_ratio, average,
        canonical_size,
    )  # fmt: skip
    for feature in features:
        check_floating(op, "features", feature, 4)
        require(
            feature.shape[0] == like.shape[0]
            and feature.shape[1] == like.shape[1]
            and feature.dtype == like.dtype
            and feature.device == like.device,
            f"{op}: images, channels, dtype and device of all feature levels must be equal",
        )


def check_gradient(op, grad, rois, sizes, scales, sampling_ratio, average, canonical_size) -> None:
    check_floating(op, "grad", grad, 4)
    require(
        len(sizes) >= 4 and len(sizes) % 2 == 0,
        f"{op}: sizes must be images, channels, and height and width of every level",
    )
    for size in sizes:
        require(size >= 0, f"{op}: sizes must not be negative")
    _check(
        op, rois, grad, len(sizes) // 2 - 1, scales, grad.shape[2], grad.shape[3], sampling_ratio,
        average, canonical_size,
    )  # fmt: skip
    require(
        grad.shape[0] == rois.shape[0] and grad.shape[1] == sizes[1],
        f"{op}: grad does not fit rois and sizes",
    )


def pyramid_roi_align(
    features, rois, scales, out_h, out_w, *,
    sampling_ratio=0, average=1, canonical_size=224.0, canonical_level=4,
) -> Tensor:  # fmt: skip
    """See `d2ext.ops.pyramid_roi_align`."""
    op = "pyramid_roi_align"
    check(op, features, rois, scales, out_h, out_w, sampling_ratio, average, canonical_size)
    batch, channels = features[0].shape[:2]
    dtype = accumulate_type(features[0])
    pooling = _Pooling(
        rois, batch, scales, (out_h, out_w), sampling_ratio, average,
        (canonical_size, canonical_level),
    )  # fmt: skip
    output = features[0].new_zeros((len(rois), channels, out_h, out_w), dtype=dtype)
    for level, feature in enumerate(features):
        data = feature.to(dtype)
        height, width = feature.shape[2:]
        for image, rows, y, x in pooling.chunks(level, channels, height, width, dtype):
            lines = data[image].reshape(-1, width) @ x.flatten(0, 1).T
            lines = lines.view(channels, height, len(rows), out_w)
            output[rows] = torch.einsum("nph,chnq->ncpq", y, lines)
    return output.to(features[0].dtype).contiguous(memory_format=layout_of(features[0]))


def pyramid_roi_align_backward(
    grad, rois, sizes, scales, channels_last, sampling_ratio, average, canonical_size,
    canonical_level,
) -> list[Tensor]:  # fmt: skip
    """Gradients of `pyramid_roi_align` by the features, in the order of the levels."""
    op = "pyramid_roi_align_backward"
    check_gradient(op, grad, rois, sizes, scales, sampling_ratio, average, canonical_size)
    (batch, channels), dtype = sizes[:2], accumulate_type(grad)
    pooling = _Pooling(
        rois, batch, scales, grad.shape[2:], sampling_ratio, average,
        (canonical_size, canonical_level),
    )  # fmt: skip
    layout = torch.channels_last if channels_last else torch.contiguous_format
    gradients = []
    for level, (height, width) in enumerate(zip(sizes[2::2], sizes[3::2], strict=True)):
        total = grad.new_zeros((batch, channels, height, width), dtype=dtype)
        for image, rows, y, x in pooling.chunks(level, channels, height, width, dtype):
            lines = torch.einsum("ncpq,nqw->npcw", grad[rows].to(dtype), x)
            part = y.flatten(0, 1).T @ lines.flatten(0, 1).flatten(1)
            total[image] += part.view(height, channels, width).transpose(0, 1)
        gradients.append(total.to(grad.dtype).contiguous(memory_format=layout))
    return gradients
