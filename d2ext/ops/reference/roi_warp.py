"""RoI warping in plain PyTorch: the implementation without a compiled kernel, and the oracle.

Samples are read as rows of a (cells, C) table. Per axis a table of two cells, two weights and two
derivative coefficients describes each sample, so both border rules and all reductions share one
path. Source: Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network Cascades",
section 4, and the sampling rule of its Caffe release.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.ops._checks import (
    BIN_REDUCTIONS,
    BORDERS,
    accumulate_type,
    check_choice,
    check_coordinates,
    check_floating,
    check_scale,
    empty_gradient,
    layout_of,
    require,
)

_CHUNK_ELEMENTS = 1 << 22
MAX_WARP_SIZE = 64


class _Axis(NamedTuple):
    """Samples of N RoIs along one axis, every tensor (N, S) except `turned` (N, 1)."""

    cell0: Tensor
    cell1: Tensor
    weight0: Tensor
    weight1: Tensor
    slope0: Tensor  # d value / d position of the two cells
    slope1: Tensor
    part: Tensor  # position inside the box, 0 at its start, 1 at its end
    valid: Tensor  # inside the map
    exists: Tensor  # edge_max: the bin has that many samples
    turned: Tensor  # box ends before it starts


def round_half_away(value: Tensor) -> Tensor:
    """C's `round`; `torch.round` sends halves to the even neighbour."""
    whole = value.trunc()
    return whole + torch.where((value - whole).abs() >= 0.5, value.sign(), torch.zeros_like(value))


def valid_rois(rois: Tensor, batch: int) -> Tensor:
    """(N,) bool: all five numbers finite and the image index inside the batch."""
    index = rois[:, 0]
    return torch.isfinite(rois).all(1) & (index >= 0) & (index < batch)


def _axis(
    start: Tensor,
    end: Tensor,
    alive: Tensor,
    length: int,
    bins: int,
    aligned: bool,
    quantize: bool,
    border: str,
    bin_reduce: str,
) -> _Axis:
    """`start` and `end` (N,) in feature cells."""
    if quantize:
        start, end = round_half_away(start), round_half_away(end)
    turned = (end < start)[:, None]
    extent = (end - start).clamp(min=0)[:, None]
    start = start[:, None]
    index = torch.arange(bins, dtype=start.dtype, device=start.device)
    exists = alive[:, None]
    if bin_reduce == "edge_max":
        steps = (extent / bins).ceil().clamp(max=float(length))
        steps = torch.where(exists, steps, torch.zeros_like(steps))
        count = int(steps.max()) + 1 if len(steps) else 1
        sub = torch.arange(count, dtype=start.dtype, device=start.device)
        place = (index[None, :, None] + (sub / steps.clamp(min=1))[:, None, :]).flatten(1)
        exists = (exists & (sub <= steps)).repeat(1, bins)
    else:
        place = index[None] + (0.5 if aligned else 0.0)
    position = start + (extent * place) / bins - (0.5 if aligned else 0.0)
    if border == "clamp_half":
        valid = (position >= -0.5) & (position <= length - 0.5)
    else:
        valid = (position > -1) & (position < length)
    valid = valid & exists
    position = torch.where(valid, position, torch.zeros_like(position))
    base = position.floor()
    frac = position - base
    one = torch.ones_like(frac)
    if border == "clamp_half":
        outer = (position < 0) | (position >= length - 1)
        base = position.clamp(0, length - 1).floor()
        weight0 = torch.where(outer, one, 1 - frac)
        weight1 = torch.where(outer, 0 * one, frac)
        slope1 = torch.where(outer, 0 * one, one)
        slope0 = -slope1
    else:
        has0, has1 = (base >= 0).to(one.dtype), (base + 1 < length).to(one.dtype)
        weight0, weight1 = (1 - frac) * has0, frac * has1
        slope0, slope1 = -has0, has1
    cell0 = base.clamp(0, length - 1).long()
    cell1 = (base + 1).clamp(0, length - 1).long()
    part = (place / bins).expand_as(position)
    exists = exists.expand_as(position)
    return _Axis(cell0, cell1, weight0, weight1, slope0, slope1, part, valid, exists, turned)


def _table(input: Tensor) -> Tensor:
    """(B, C, H, W) -> (B*H*W, C) in the type of accumulation."""
    batch, channels, height, width = input.shape
    rows = input.to(accumulate_type(input)).permute(0, 2, 3, 1)
    return rows.reshape(batch * height * width, channels)


class _Samples:
    """Every bilinear sample of some RoIs, as rows."""

    def __init__(self, shape, rois: Tensor, scale: float, size, options) -> None:
        batch, _, height, width = shape
        alive = valid_rois(rois, batch)
        box = torch.where(alive[:, None], rois[:, 1:], torch.zeros_like(rois[:, 1:])) * scale
        self.x = _axis(box[:, 0], box[:, 2], alive, width, size[1], *options)
        self.y = _axis(box[:, 1], box[:, 3], alive, height, size[0], *options)
        image = torch.where(alive, rois[:, 0], torch.zeros_like(rois[:, 0])).long()
        self.first = (image * (height * width))[:, None, None]
        self.width = width
        self.valid = self.y.valid[:, :, None] & self.x.valid[:, None, :]
        self.exists = self.y.exists[:, :, None] & self.x.exists[:, None, :]

    def corners(self):
        """Yield (rows, corner of y, corner of x) with rows (n*Sy*Sx,) into the table."""
        for i, cy in enumerate((self.y.cell0, self.y.cell1)):
            for j, cx in enumerate((self.x.cell0, self.x.cell1)):
                rows = self.first + cy[:, :, None] * self.width + cx[:, None, :]
                yield rows.reshape(-1), i, j

    def product(self, y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor], i: int, j: int) -> Tensor:
        return y[i][:, :, None] * x[j][:, None, :]

    def read(self, table: Tensor) -> Tensor:
        """Values (n, Sy, Sx, C), zero outside the map."""
        shape = (*self.valid.shape, table.shape[1])
        weights_y, weights_x = self.y[2:4], self.x[2:4]
        total = None
        for rows, i, j in self.corners():
            weight = self.product(weights_y, weights_x, i, j)[..., None]
            part = table.index_select(0, rows).view(shape) * weight
            total = part if total is None else total + part
        return torch.where(self.valid[..., None], total, torch.zeros_like(total))

    def spread(self, table: Tensor, grad: Tensor) -> None:
        """Add the transpose of `read` of `grad` (n, Sy, Sx, C) to `table`."""
        for rows, i, j in self.corners():
            weight = self.product(self.y[2:4], self.x[2:4], i, j)[..., None]
            table.index_add_(0, rows, (grad * weight).reshape(-1, table.shape[1]))

    def box_gradient(self, table: Tensor, grad: Tensor, scale: float) -> Tensor:
        """(n, 5): derivative by image index (zero), x1, y1, x2, y2."""
        by_x = by_y = 0
        for rows, i, j in self.corners():
            dot = (table.index_select(0, rows).view_as(grad) * grad).sum(-1)
            by_x = by_x + dot * self.product(self.y[2:4], self.x[4:6], i, j)
            by_y = by_y + dot * self.product(self.y[4:6], self.x[2:4], i, j)
        columns = [torch.zeros_like(by_x[:, 0, 0])]
        sums = [
            _ends(by_x.sum(1), self.x, scale),
            _ends(by_y.sum(2), self.y, scale),
        ]
        columns += [sums[0][0], sums[1][0], sums[0][1], sums[1][1]]
        return torch.stack(columns, 1)


def _ends(gradient: Tensor, axis: _Axis, scale: float) -> tuple[Tensor, Tensor]:
    part = torch.where(axis.turned, torch.zeros_like(axis.part), axis.part)
    return (gradient * (1 - part)).sum(1) * scale, (gradient * part).sum(1) * scale


def _blocks(values: Tensor, size, fill: Tensor | None) -> Tensor:
    """(n, Ph*my, Pw*mx, C) -> (n, Ph, Pw, my*mx, C), samples in row-major order."""
    n, sy, sx, channels = values.shape
    my, mx = sy // size[0], sx // size[1]
    if fill is not None:
        values = values.masked_fill(~fill[..., None], float("-inf"))
    blocks = values.view(n, size[0], my, size[1], mx, channels).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, size[0], size[1], my * mx, channels)


def _unblock(blocks: Tensor, shape) -> Tensor:
    n, sy, sx, channels = shape
    height, width = blocks.shape[1:3]
    blocks = blocks.view(n, height, width, sy // height, sx // width, channels)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(shape)


class _Warp:
    """Shared walk over chunks of RoIs. `pool` 2 is the 2x2 maximum of the twice finer warp."""

    def __init__(self, input, rois, scale, size, aligned, quantize, border, bin_reduce, pool):
        self.input, self.scale, self.size, self.pool = input, scale, size, pool
        self.rois = rois.to(accumulate_type(input))
        self.options = (aligned, quantize, border, bin_reduce)
        self.edge = bin_reduce == "edge_max"
        steps = pool * (1 + (max(input.shape[2:]) // max(min(size), 1) if self.edge else 0))
        per_roi = max(1, size[0] * size[1] * steps * steps * input.shape[1])
        self.chunk = max(1, _CHUNK_ELEMENTS // per_roi)

    def samples(self, first: int) -> _Samples:
        rois = self.rois[first : first + self.chunk]
        size = (self.size[0] * self.pool, self.size[1] * self.pool)
        return _Samples(self.input.shape, rois, self.scale, size, self.options)

    def _counted(self, samples: _Samples) -> Tensor | None:
        """edge_max looks at samples inside the map only; the pooled warp counts the others as 0."""
        return samples.valid if self.edge else None

    def forward(self) -> Tensor:
        table = _table(self.input)
        shape = (len(self.rois), self.input.shape[1], *self.size)
        output = table.new_zeros(shape)
        for first in range(0, len(self.rois) if output.numel() and len(table) else 0, self.chunk):
            samples = self.samples(first)
            values = samples.read(table)
            if self.pool > 1 or self.edge:
                values = _blocks(values, self.size, self._counted(samples)).amax(3)
                values = torch.where(values == float("-inf"), torch.zeros_like(values), values)
            output[first : first + self.chunk] = values.permute(0, 3, 1, 2)
        return output.to(self.input.dtype).contiguous(memory_format=layout_of(self.input))

    def backward(self, grad: Tensor, need_input: bool, need_rois: bool) -> tuple[Tensor, Tensor]:
        table = _table(self.input)
        grad = grad.to(table.dtype)
        table_grad = torch.zeros_like(table) if need_input else None
        rois_grad = self.rois.new_zeros(self.rois.shape)
        for first in range(0, len(self.rois) if grad.numel() and len(table) else 0, self.chunk):
            samples = self.samples(first)
            rows = grad[first : first + self.chunk].permute(0, 2, 3, 1)
            if self.pool > 1 or self.edge:
                values = samples.read(table)
                blocks = _blocks(values, self.size, self._counted(samples))
                winner = blocks.argmax(3, keepdim=True)
                spread = torch.zeros_like(blocks).scatter_(3, winner, rows[:, :, :, None])
                rows = _unblock(spread, values.shape)
            rows = torch.where(samples.valid[..., None], rows, torch.zeros_like(rows))
            if need_input:
                samples.spread(table_grad, rows)
            if need_rois:
                chunk = samples.box_gradient(table, rows, self.scale)
                rois_grad[first : first + self.chunk] = chunk
        input_grad = empty_gradient(self.input)
        if need_input:
            batch, channels, height, width = self.input.shape
            input_grad = table_grad.view(batch, height, width, channels).permute(0, 3, 1, 2)
            input_grad = input_grad.to(self.input.dtype)
            input_grad = input_grad.contiguous(memory_format=layout_of(self.input))
        return input_grad, rois_grad


def check(op, input, rois, scale, out_h, out_w, border, bin_reduce="point") -> None:
    check_floating(op, "input", input, 4)
    check_coordinates(op, "rois", rois, 5, input)
    check_scale(op, scale)
    for size in (out_h, out_w):
        require(
            size >= 1 and size <= MAX_WARP_SIZE,
            f"{op}: output size must lie in 1..{MAX_WARP_SIZE}",
        )
    check_choice(op, "border", border, BORDERS)
    check_choice(op, "bin_reduce", bin_reduce, BIN_REDUCTIONS)


def check_gradient(op: str, grad: Tensor, input: Tensor, rois: Tensor, out_h, out_w) -> None:
    require(
        grad.dim() == 4
        and grad.shape[0] == rois.shape[0]
        and grad.shape[1] == input.shape[1]
        and grad.shape[2] == out_h
        and grad.shape[3] == out_w
        and grad.dtype == input.dtype
        and grad.device == input.device,
        f"{op}: grad must have shape, dtype and device of the output",
    )


def _run(op, input, rois, scale, size, aligned, quantize, border, bin_reduce, pool) -> _Warp:
    check(op, input, rois, scale, *size, border, bin_reduce)
    return _Warp(input, rois, scale, size, aligned, quantize, border, bin_reduce, pool)


def roi_warp(
    input, rois, spatial_scale, out_h, out_w, *,
    aligned=True, quantize=False, border="clamp_half", bin_reduce="point",
) -> Tensor:  # fmt: skip
    """See `d2ext.ops.roi_warp`."""
    size = (out_h, out_w)
    warp = _run(
        "roi_warp", input, rois, spatial_scale, size, aligned, quantize, border, bin_reduce, 1
    )
    return warp.forward()


def roi_warp_backward(
    grad, input, rois, spatial_scale, out_h, out_w,
    aligned, quantize, border, bin_reduce, need_input, need_rois,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `roi_warp` by `input` and `rois`; unneeded ones have no elements."""
    size = (out_h, out_w)
    warp = _run(
        "roi_warp", input, rois, spatial_scale, size, aligned, quantize, border, bin_reduce, 1
    )
    return _gradients("roi_warp", warp, grad, rois, size, need_input, need_rois)


def roi_warp_max_pool(
    input, rois, spatial_scale, out_h, out_w, *, aligned=True, quantize=False, border="clamp_half"
) -> Tensor:
    """See `d2ext.ops.roi_warp_max_pool`."""
    size = (out_h, out_w)
    op = "roi_warp_max_pool"
    return _run(
        op, input, rois, spatial_scale, size, aligned, quantize, border, "point", 2
    ).forward()


def roi_warp_max_pool_backward(
    grad, input, rois, spatial_scale, out_h, out_w,
    aligned, quantize, border, need_input, need_rois,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `roi_warp_max_pool`."""
    size = (out_h, out_w)
    op = "roi_warp_max_pool"
    warp = _run(op, input, rois, spatial_scale, size, aligned, quantize, border, "point", 2)
    return _gradients(op, warp, grad, rois, size, need_input, need_rois)


def _gradients(op, warp, grad, rois, size, need_input, need_rois) -> tuple[Tensor, Tensor]:
    check_gradient(op, grad, warp.input, rois, *size)
    input_grad, rois_grad = warp.backward(grad, need_input, need_rois)
    return input_grad, rois_grad.to(rois.dtype) if need_rois else empty_gradient(rois)
