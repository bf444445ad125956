"""Position-sensitive assembly in plain PyTorch, by integral images in float64.

Source: Li et al., "Fully Convolutional Instance-aware Semantic Segmentation", section 2, with the
bin rule of its MXNet release. Bin bounds are always computed in float32, whatever the dtype of the
data: in float64 one box in five hundred would get other bins than in the release.
"""

from typing import NamedTuple

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
from d2ext.ops.reference.roi_warp import round_half_away, valid_rois

_CHUNK_ELEMENTS = 1 << 22
MAX_PS_SIZE = 128


class Bins(NamedTuple):
    """Half-open cell ranges of N RoIs, each (N, P) int64; empty where `first == last`."""

    first: Tensor
    last: Tensor


def part_index(out_size: int, group_size: int) -> list[int]:
    """Which of the `group_size` parts each of the `out_size` output positions reads."""
    return [p * group_size // out_size for p in range(out_size)]


def _to_cells(value: Tensor, length: int) -> Tensor:
    return value.nan_to_num(0.0).clamp(0, length).long()


def bins(
    low: Tensor, high: Tensor, alive: Tensor, scale: float, length: int, out_size: int,
    inclusive: bool,
) -> Bins:  # fmt: skip
    """Cells that each output position averages along one axis; ends (N,) in pixels."""
    low, high = low.float(), high.float()
    if inclusive:
        low, high = round_half_away(low), round_half_away(high) + 1
    start, end = low * scale, high * scale
    size = ((end - start).clamp(min=0.1) / out_size)[:, None]
    start = start[:, None]
    index = torch.arange(out_size, dtype=torch.float32, device=low.device)[None]
    first = _to_cells((index * size + start).floor(), length)
    last = _to_cells(((index + 1) * size + start).ceil(), length)
    last = torch.maximum(first, last)
    return Bins(first, torch.where(alive[:, None], last, first))


class Assembly:
    """Bins of some RoIs on a score map of `shape` (B, C, H, W) and reads through them."""

    def __init__(self, shape, rois, scale, group_size, out_size, inclusive) -> None:
        batch, channels, self.height, self.width = shape
        self.parts = group_size * group_size
        self.maps = channels // self.parts
        self.size = out_size
        alive = valid_rois(rois, batch)
        box = torch.where(alive[:, None], rois, torch.zeros_like(rois))
        options = (out_size, inclusive)
        x = bins(box[:, 1], box[:, 3], alive, scale, self.width, *options)
        y = bins(box[:, 2], box[:, 4], alive, scale, self.height, *options)
        group = torch.tensor(part_index(out_size, group_size), device=rois.device)
        part = group[:, None] * group_size + group[None]
        image = box[:, 0].long()
        self.first = (image[:, None, None] * self.parts + part) * (self.height + 1)
        self.x, self.y = x, y
        rows = (y.last - y.first)[:, :, None]
        self.area = (rows * (x.last - x.first)[:, None, :])[..., None]

    def _corners(self):
        for y, sign_y in ((self.y.first, -1), (self.y.last, 1)):
            for x, sign_x in ((self.x.first, -1), (self.x.last, 1)):
                rows = (self.first + y[:, :, None]) * (self.width + 1) + x[:, None, :]
                yield rows.reshape(-1), sign_y * sign_x

    def _reciprocal(self) -> Tensor:
        return torch.where(self.area > 0, 1.0 / self.area.clamp(min=1).double(), 0.0)

    def mean(self, table: Tensor) -> Tensor:
        """(n, P, P, D) means from an `integral` table."""
        total = 0
        for rows, sign in self._corners():
            total = total + sign * table.index_select(0, rows)
        return total.view(*self.area.shape[:3], self.maps) * self._reciprocal()

    def spread(self, table: Tensor, grad: Tensor) -> None:
        """Add the transpose of `mean` of `grad` (n, P, P, D) to `table`."""
        share = (grad * self._reciprocal()).reshape(-1, self.maps)
        for rows, sign in self._corners():
            table.index_add_(0, rows, share, alpha=sign)


def integral(input: Tensor, parts: int) -> Tensor:
    """(B, D*parts, H, W) -> rows (B*parts*(H+1)*(W+1), D) of summed areas in float64."""
    batch, channels, height, width = input.shape
    maps = channels // parts
    sums = input.double().view(batch, maps, parts, height, width).permute(0, 2, 3, 4, 1)
    table = sums.new_zeros(batch, parts, height + 1, width + 1, maps)
    table[:, :, 1:, 1:] = sums.cumsum(2).cumsum(3)
    return table.view(-1, maps)


def integral_transpose(table: Tensor, shape, parts: int) -> Tensor:
    """The transpose of `integral`, back to (B, D*parts, H, W) in float64."""
    batch, channels, height, width = shape
    table = table.view(batch, parts, height + 1, width + 1, channels // parts)
    sums = table[:, :, 1:, 1:].flip(2, 3).cumsum(2).cumsum(3).flip(2, 3)
    return sums.permute(0, 4, 1, 2, 3).reshape(batch, channels, height, width)


def check(op, input, rois, scale, group_size, out_size, name="input", sides=1) -> None:
    check_floating(op, name, input, 4)
    check_coordinates(op, "rois", rois, 5, input)
    check_scale(op, scale)
    require(
        1 <= group_size <= out_size <= MAX_PS_SIZE,
        f"{op}: 1 <= group_size <= out_size <= {MAX_PS_SIZE} must hold",
    )
    parts = sides * group_size * group_size
    require(
        input.shape[1] % parts == 0,
        f"{op}: the channels of {name} must be a multiple of {parts}",
    )


def chunks(rois: Tensor, maps: int, out_size: int):
    """Slices of RoIs small enough to assemble at once."""
    step = max(1, _CHUNK_ELEMENTS // max(1, maps * out_size * out_size))
    for first in range(0, len(rois), step):
        yield slice(first, first + step)


def as_contiguous(input: Tensor) -> Tensor:
    return input.to(accumulate_type(input)).contiguous()


def ps_roi_assemble(input, rois, spatial_scale, group_size, out_size, *, inclusive=False) -> Tensor:
    """See `d2ext.ops.ps_roi_assemble`."""
    check("ps_roi_assemble", input, rois, spatial_scale, group_size, out_size)
    parts = group_size * group_size
    maps = input.shape[1] // parts
    output = input.new_zeros((len(rois), maps, out_size, out_size))
    if output.numel() and input.numel():
        table = integral(as_contiguous(input), parts)
        for part in chunks(rois, maps, out_size):
            assembly = Assembly(
                input.shape, rois[part], spatial_scale, group_size, out_size, inclusive
            )
            output[part] = assembly.mean(table).permute(0, 3, 1, 2).to(input.dtype)
    return output.contiguous(memory_format=layout_of(input))


def ps_roi_assemble_backward(
    grad, rois, spatial_scale, group_size, input_size, inclusive
) -> Tensor:
    """Gradient of `ps_roi_assemble` by `input` of shape `input_size`; contiguous."""
    op = "ps_roi_assemble"
    check_floating(op, "grad", grad, 4)
    require(
        len(input_size) == 4 and grad.shape[2] == grad.shape[3],
        f"{op}: grad must be (N, D, P, P) and input_size have 4 numbers",
    )
    parts = group_size * group_size
    require(
        grad.shape[0] == rois.shape[0] and grad.shape[1] * parts == input_size[1],
        f"{op}: grad does not fit rois and input_size",
    )
    shape = tuple(input_size)
    table = grad.new_zeros(
        (shape[0] * parts * (shape[2] + 1) * (shape[3] + 1), grad.shape[1]), dtype=torch.float64
    )
    if len(table) and grad.numel():
        for part in chunks(rois, grad.shape[1], grad.shape[2]):
            assembly = Assembly(
                shape, rois[part], spatial_scale, group_size, grad.shape[2], inclusive
            )
            assembly.spread(table, grad[part].double().permute(0, 2, 3, 1))
    return integral_transpose(table, shape, parts).to(grad.dtype)


def ps_roi_mean(input, rois, spatial_scale, group_size, out_size, *, inclusive=False) -> Tensor:
    """See `d2ext.ops.ps_roi_mean`."""
    check("ps_roi_mean", input, rois, spatial_scale, group_size, out_size)
    parts = group_size * group_size
    maps = input.shape[1] // parts
    output = input.new_zeros((len(rois), maps))
    if output.numel() and input.numel():
        table = integral(as_contiguous(input), parts)
        for part in chunks(rois, maps, out_size):
            assembly = Assembly(
                input.shape, rois[part], spatial_scale, group_size, out_size, inclusive
            )
            output[part] = assembly.mean(table).mean((1, 2)).to(input.dtype)
    return output


def ps_roi_mean_backward(
    grad, rois, spatial_scale, group_size, out_size, input_size, inclusive
) -> Tensor:
    """Gradient of `ps_roi_mean` by `input` of shape `input_size`; contiguous."""
    check_floating("ps_roi_mean", "grad", grad, 2)
    full = grad.to(accumulate_type(grad))[:, :, None, None] / (out_size * out_size)
    full = full.expand(-1, -1, out_size, out_size)
    return ps_roi_assemble_backward(
        full, rois, spatial_scale, group_size, input_size, inclusive
    ).to(grad.dtype)
