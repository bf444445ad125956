"""The operators as standard operators of PyTorch and ONNX, for programs that run elsewhere.

Same arguments and results as the operators, up to rounding, but without control flow that depends
on data: `torch.export` can go through them, and an ONNX runtime needs no library of ours. They hold
more at once than the kernels do, know batches of one image, and have no gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from d2ext.ops.mask_voting import MaskVoting, VotedInstances, inclusive_iou
from d2ext.ops.reference.ps_roi import part_index
from d2ext.ops.reference.pyramid_roi_align import pyramid_levels
from d2ext.ops.reference.roi_warp import valid_rois

_FAR = 1e9  # beyond all pixels

# ------------------------------------------------------------------ helpers


def scalar(number: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A size as a tensor, so that it can be compared with coordinates in a program: while
    `torch.jit` traces, sizes are tensors, while `torch.export` does, symbols."""
    if isinstance(number, Tensor):
        return number.to(dtype)
    return torch.scalar_tensor(number, dtype=dtype)


def _round_half_away(value: Tensor) -> Tensor:
    """C's `round`."""
    size = value.abs()
    whole = size.floor()
    return value.sign() * (whole + (size - whole >= 0.5).to(value.dtype))


def hat(position: Tensor, length: int) -> Tensor:
    """Weights (..., length) of cells 0..length-1 for bilinear samples at `position` (...), which
    lies within them."""
    cell = torch.arange(length, dtype=position.dtype, device=position.device)
    return (1 - (position[..., None] - cell).abs()).clamp(min=0)


def best_rows(scores: Tensor, most: int) -> Tensor:
    """Rows of the `most` highest of (N,) scores, best first; fewer where N is smaller. Scores of
    minus infinity are left out."""
    filled = torch.cat([scores, scores.new_full((most,), -torch.inf)])
    values, rows = filled.topk(most)
    return rows[(values > -torch.inf).nonzero()[:, 0]]


# ------------------------------------------------------------------ regions of maps


def _positions(
    start: Tensor,
    end: Tensor,
    length: Tensor,
    bins: int,
    aligned: bool,
    quantize: bool,
    zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Where N boxes are sampled along one axis (N, bins), and which samples count."""
    if quantize:
        start, end = _round_half_away(start), _round_half_away(end)
    extent = (end - start).clamp(min=0)[:, None]
    shift = 0.5 if aligned else 0.0
    place = torch.arange(bins, dtype=start.dtype, device=start.device) + shift
    position = start[:, None] + (extent * place) / bins - shift
    if zeros:
        return position, (position > -1) & (position < length)
    return position, (position >= -0.5) & (position <= length - 0.5)


def roi_warp_form(
    input, rois, spatial_scale, out_h, out_w, *,
    aligned=True, quantize=False, border="clamp_half", bin_reduce="point",
) -> Tensor:  # fmt: skip
    """`d2ext.ops.roi_warp` of one image, by GridSample; `bin_reduce` has to be "point"."""
    if bin_reduce != "point":
        raise NotImplementedError("roi_warp with bin_reduce='edge_max' has no standard form")
    height, width = (scalar(n) for n in input.shape[2:])
    alive = valid_rois(rois, 1)
    box = torch.where(alive[:, None], rois[:, 1:], torch.zeros_like(rois[:, 1:])) * spatial_scale
    options = (aligned, quantize, border == "zeros")
    x, valid_x = _positions(box[:, 0], box[:, 2], width, out_w, *options)
    y, valid_y = _positions(box[:, 1], box[:, 3], height, out_h, *options)
    valid = valid_y[:, :, None] & valid_x[:, None, :] & alive[:, None, None]
    # Half-pixel coordinates of -1..1: no division by zero where a map has one cell.
    x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, out_h, -1), y[:, :, None].expand(-1, -1, out_w)], dim=-1
    )
    values = F.grid_sample(
        input,
        grid.flatten(0, 1)[None],
        padding_mode="zeros" if border == "zeros" else "border",
        align_corners=False,
    )[0]
    values = values.reshape(input.shape[1], rois.shape[0], out_h, out_w).transpose(0, 1)
    return torch.where(valid[:, None], values, torch.zeros_like(values))


def roi_warp_max_pool_form(
    input, rois, spatial_scale, out_h, out_w, *, aligned=True, quantize=False, border="clamp_half"
) -> Tensor:
    """`d2ext.ops.roi_warp_max_pool` of one image."""
    values = roi_warp_form(
        input, rois, spatial_scale, 2 * out_h, 2 * out_w,
        aligned=aligned, quantize=quantize, border=border,
    )  # fmt: skip
    return F.max_pool2d(values, 2)


def pyramid_roi_align_form(
    features, rois, scales, out_h, out_w, *,
    sampling_ratio=0, average=1, canonical_size=224.0, canonical_level=4,
) -> Tensor:  # fmt: skip
    """`d2ext.ops.pyramid_roi_align`, by one RoiAlign for each level."""
    size = (out_h * average, out_w * average)
    if len(scales) == 1:
        result = roi_align(features[0], rois, size, scales[0], sampling_ratio, True)
        return F.avg_pool2d(result, average) if average > 1 else result
    levels = pyramid_levels(rois, scales, canonical_size, canonical_level)
    result = features[0].new_zeros((rois.shape[0], features[0].shape[1], *size))
    for level, (feature, scale) in enumerate(zip(features, scales)):
        rows = (levels == level).nonzero()[:, 0]
        part = roi_align(feature, rois[rows], size, scale, sampling_ratio, True)
        result = result.index_put((rows,), part)
    return F.avg_pool2d(result, average) if average > 1 else result


def _bins(
    low: Tensor, high: Tensor, scale: float, length: Tensor, out_size: int, inclusive: bool
) -> tuple[Tensor, Tensor]:
    """First cell of every output position (N, P) along one axis, and the one after the last."""
    if inclusive:
        low, high = _round_half_away(low), _round_half_away(high) + 1
    start, end = (low * scale)[:, None], (high * scale)[:, None]
    size = (end - start).clamp(min=0.1) / out_size
    index = torch.arange(out_size, dtype=torch.float32, device=low.device)[None]
    first = (index * size + start).floor()
    last = ((index + 1) * size + start).ceil()
    first, last = (torch.minimum(x.clamp(min=0), length).long() for x in (first, last))
    return first, torch.maximum(first, last)


def _assemble(
    input: Tensor, rois: Tensor, scale: float, group_size: int, out_size: int, inclusive: bool
) -> Tensor:
    """(N, P, P, D) of `ps_roi_assemble`, by summed areas in float64."""
    parts, (channels, height, width) = group_size * group_size, input.shape[1:]
    maps, count = channels // parts, rois.shape[0]
    sums = input[0].double().reshape(maps, parts, height, width).permute(1, 2, 3, 0)
    table = F.pad(sums.cumsum(1).cumsum(2), (0, 0, 1, 0, 1, 0)).reshape(-1, maps)
    alive = valid_rois(rois, 1)
    box = torch.where(alive[:, None], rois, torch.zeros_like(rois)).float()
    x = _bins(box[:, 1], box[:, 3], scale, scalar(width), out_size, inclusive)
    y = _bins(box[:, 2], box[:, 4], scale, scalar(height), out_size, inclusive)
    group = torch.tensor(part_index(out_size, group_size), device=rois.device)
    part = (group[:, None] * group_size + group[None])[None] * (height + 1)
    total = torch.zeros_like(table[:1]).reshape(1, 1, 1, -1)
    for own_y, sign_y in zip(y, (-1, 1)):
        for own_x, sign_x in zip(x, (-1, 1)):
            rows = (part + own_y[:, :, None]) * (width + 1) + own_x[:, None, :]
            values = table.index_select(0, rows.flatten())
            total = total + sign_y * sign_x * values.reshape(count, out_size, out_size, maps)
    area = (y[1] - y[0])[:, :, None] * (x[1] - x[0])[:, None, :]
    area = (area * alive[:, None, None].long())[..., None].double()
    mean = total / area.clamp(min=1)
    return torch.where(area > 0, mean, torch.zeros_like(mean)).to(input.dtype)


def ps_roi_assemble_form(
    input, rois, spatial_scale, group_size, out_size, *, inclusive=False
) -> Tensor:
    """`d2ext.ops.ps_roi_assemble` of one image."""
    maps = _assemble(input, rois, spatial_scale, group_size, out_size, inclusive)
    return maps.permute(0, 3, 1, 2)


def ps_roi_mean_form(
    input, rois, spatial_scale, group_size, out_size, *, inclusive=False
) -> Tensor:
    """`d2ext.ops.ps_roi_mean` of one image."""
    return _assemble(input, rois, spatial_scale, group_size, out_size, inclusive).mean((1, 2))


def fcis_joint_head_form(
    score, rois, spatial_scale, group_size, out_size, pick=None, *, inclusive=False
) -> tuple[Tensor, Tensor, Tensor]:
    """`d2ext.ops.fcis_joint_head` of one image, with the whole assembled tensor at once."""
    maps = _assemble(score, rois, spatial_scale, group_size, out_size, inclusive)
    pairs = maps.unflatten(3, (-1, 2))
    logits = pairs.amax(4).mean((1, 2))
    chosen = logits[:, :-1].argmax(1) if pick is None else pick.clamp(0, logits.shape[1] - 1)
    index = chosen[:, None, None, None, None].expand(-1, out_size, out_size, 1, 2)
    seg = pairs.gather(3, index)[:, :, :, 0].permute(0, 3, 1, 2)
    if pick is None:
        return logits, seg, chosen
    known = (pick >= 0) & (pick < logits.shape[1])
    return logits, torch.where(known[:, None, None, None], seg, torch.zeros_like(seg)), pick


# ------------------------------------------------------------------ masks


def _corner_matrix(length: int, out: int, like: Tensor) -> Tensor:
    """Weights (out, length) of samples at `i * length / out`."""
    cells, samples = scalar(length, like.dtype), scalar(out, like.dtype)
    position = torch.arange(out, dtype=like.dtype, device=like.device) * cells / samples
    inside = (position <= cells - 0.5).to(like.dtype)
    return hat(torch.minimum(position, cells - 1), length) * inside[:, None]


def mask_resize_form(masks, out_h, out_w) -> Tensor:
    """`d2ext.ops.mask_resize`."""
    wide = masks @ _corner_matrix(masks.shape[3], out_w, masks).T
    return (wide.transpose(-1, -2) @ _corner_matrix(masks.shape[2], out_h, masks).T).transpose(
        -1, -2
    )


def mask_gate_form(features, masks) -> Tensor:
    """`d2ext.ops.mask_gate`."""
    return features * mask_resize_form(masks, features.shape[2], features.shape[3])


class _Samples(NamedTuple):
    """How the cells of masks weigh along one axis, (..., pixels, M); `plain`: without
    interpolation, and `last` (..., pixels): whether a pixel falls into the last cell. None
    without "mnc"."""

    weight: Tensor
    plain: Tensor | None
    last: Tensor | None


def _samples(position: Tensor, length: int, inside: Tensor | None, corner: bool) -> _Samples:
    weight, plain, last = hat(position, length), None, None
    if corner:
        cell = position.floor()[..., None]
        plain = (cell == torch.arange(length, dtype=position.dtype)).to(position.dtype)
        last = position.floor() == scalar(length, position.dtype) - 1
    if inside is not None:
        weight = weight * inside[..., None]
        plain = plain * inside[..., None] if plain is not None else None
    return _Samples(weight, plain, last)


def _read(planes: Tensor, rows: _Samples, columns: _Samples) -> Tensor:
    """Bilinear samples (N, y, x) of planes (N, h, w). In the last row and column of "mnc" nothing
    is interpolated."""
    value = torch.bmm(torch.bmm(rows.weight, planes), columns.weight.transpose(-1, -2))
    if rows.plain is None or columns.plain is None or rows.last is None or columns.last is None:
        return value
    plain = torch.bmm(torch.bmm(rows.plain, planes), columns.plain.transpose(-1, -2))
    return torch.where(rows.last[:, :, None] | columns.last[:, None, :], plain, value)


def _drawn(masks: Tensor, boxes: Tensor, size: tuple[int, int], mode: str, threshold: float):
    """All masks in the image, N x height x width, zero outside of their boxes."""
    corner, cells = mode == "mnc", masks.shape[1]
    boxes = boxes if corner else boxes.round()

    def axis(low: Tensor, high: Tensor, image: int) -> tuple[_Samples, Tensor]:
        low, high = low[:, None], high[:, None]
        pixel = torch.arange(image, dtype=low.dtype, device=low.device)
        inside = ((pixel >= low) & (pixel <= high)).to(low.dtype)
        shift = 0.0 if corner else 0.5
        position = (pixel - low + shift) * cells / (high - low + 1) - shift
        position = torch.minimum(position.clamp(min=0), scalar(cells, low.dtype) - 1)
        return _samples(position, cells, inside, corner), inside

    rows, inside_y = axis(boxes[:, 1], boxes[:, 3], size[0])
    columns, inside_x = axis(boxes[:, 0], boxes[:, 2], size[1])
    value = _read(masks, rows, columns)
    if corner:
        return value
    return (value >= threshold).to(masks.dtype) * inside_y[:, :, None] * inside_x[:, None, :]


def _ends(inside: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """First and last of R x pixels that count (1, others 0); `empty` where none does."""
    pixel = torch.arange(inside.shape[1], dtype=inside.dtype, device=inside.device)
    last = (inside * (pixel + 1)).amax(1) - 1
    first = torch.where(inside > 0, pixel, torch.full_like(inside, _FAR)).amin(1)
    return torch.where(last < 0, empty, first), torch.where(last < 0, empty, last)


def mask_vote_form(
    masks: Tensor,
    boxes: Tensor,
    weights: Tensor,
    size: tuple[int, int],
    threshold: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """`d2ext.ops.mask_vote` with a matrix (R, N) of weights in the place of lists of candidates.

    Holds all N masks in the image at once.

    Returns:
        masks (R, M, M) and boxes (R, 4), float32.
    """
    cells, corner = masks.shape[1], mode == "mnc"
    drawn = _drawn(masks, boxes, size, mode, threshold)
    total = (weights @ drawn.flatten(1)).reshape(weights.shape[0], *size)
    inside = (total > threshold if corner else total >= threshold).to(masks.dtype)
    middle = [scalar(n, masks.dtype) / 2 for n in size]
    if mode == "crop":  # rounded up, inside of the image
        middle = [torch.minimum(x.ceil(), 2 * x - 1) for x in middle]
    else:
        middle = [x.floor() for x in middle]
    y1, y2 = _ends(inside.amax(2), middle[0])
    x1, x2 = _ends(inside.amax(1), middle[1])

    def axis(low: Tensor, high: Tensor, image: int) -> _Samples:
        index = torch.arange(cells, dtype=low.dtype, device=low.device)
        low, span = low[:, None], (high - low + 1)[:, None]
        if corner:
            position = low + index * span / cells
        else:
            position = (index + 0.5) * span / cells - 0.5
            if mode == "crop":
                position = torch.minimum(position.clamp(min=0), span - 1)
            position = position + low
        most = scalar(image, low.dtype) - 1
        samples = _samples(torch.minimum(position.clamp(min=0), most), image, None, False)
        if not corner:
            return samples
        cell = torch.minimum(position.clamp(min=0), most).floor()
        pixel = torch.arange(image, dtype=low.dtype, device=low.device)
        plain = (cell[..., None] == pixel).to(low.dtype)
        return _Samples(samples.weight, plain, cell == most)

    voted = _read(total, axis(y1, y2, size[0]), axis(x1, x2, size[1]))
    return voted, torch.stack([x1, y1, x2, y2], dim=1)


def choose_seeds_form(voting: MaskVoting, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """`MaskVoting.choose_seeds`."""
    exclusive = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    seeds, classes = [], []
    for column in range(scores.shape[1]):
        own = scores[:, column]
        kept = nms(exclusive, own, voting.nms_threshold)
        kept = kept[best_rows(own[kept], voting.max_per_image)]
        seeds.append(kept)
        classes.append(torch.full_like(kept, column))
    seed, cls = torch.cat(seeds), torch.cat(classes)
    value = scores[seed, cls]
    filled = torch.cat([value, value.new_full((voting.max_per_image,), -torch.inf)])
    floor = filled.topk(voting.max_per_image).values[-1].clamp(min=voting.score_threshold)
    kept = (value >= floor).nonzero()[:, 0]
    return seed[kept], cls[kept]


def mask_voting_form(
    voting: MaskVoting, boxes: Tensor, masks: Tensor, scores: Tensor, size: tuple[int, int]
) -> VotedInstances:
    """`MaskVoting.forward`, with float32 boxes."""
    seeds, classes = choose_seeds_form(voting, boxes, scores)
    votes = inclusive_iou(boxes[seeds], boxes) >= voting.merge_threshold
    weight = torch.where(votes, scores.T[classes], torch.zeros_like(scores[:1, 0]))
    total, count = weight.sum(1, keepdim=True), votes.sum(1, keepdim=True)
    equal = votes.to(weight.dtype) / count.clamp(min=1)
    weight = torch.where(total > 0, weight / total, equal)
    voted, tight = mask_vote_form(masks, boxes, weight, size, voting.binary_threshold, voting.mode)
    result = VotedInstances(tight, voted, scores[seeds, classes], classes, seeds)
    if voting.mode == "fcis":  # its release drops results one pixel wide or high
        solid = (tight[:, 2] > tight[:, 0]) & (tight[:, 3] > tight[:, 1])
        kept = solid.nonzero()[:, 0]
        result = VotedInstances(*(value[kept] for value in result))
    return result


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Operator -> its standard form, as `torch.export.ExportedProgram.run_decompositions` takes
    it."""
    forms: dict[str, Callable[..., Any]] = {
        "roi_warp": roi_warp_form,
        "roi_warp_max_pool": roi_warp_max_pool_form,
        "pyramid_roi_align": pyramid_roi_align_form,
        "ps_roi_assemble": ps_roi_assemble_form,
        "ps_roi_mean": ps_roi_mean_form,
        "fcis_joint_head": fcis_joint_head_form,
        "mask_resize": mask_resize_form,
        "mask_gate": mask_gate_form,
    }
    return {getattr(torch.ops.d2ext, name).default: form for name, form in forms.items()}
