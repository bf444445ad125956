"""Mask operators in plain PyTorch: corner-anchored resize, gate, pasting and voting.

Sources: Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network Cascades",
sections 3.3 and 6 with the rules of its Caffe release; Li et al., "Fully Convolutional
Instance-aware Semantic Segmentation", section 2.3; detectron2's `paste_masks_in_image`.
"""

import torch
from torch import Tensor

from d2ext.ops._checks import (
    VOTE_MODES,
    accumulate_type,
    check_choice,
    check_coordinates,
    check_floating,
    layout_of,
    require,
)

_CHUNK_ELEMENTS = 1 << 22
MAX_MASK_SIZE = 512


# ------------------------------------------------------------------ resize and gate
def check_resize(op: str, masks: Tensor, out_h, out_w) -> None:
    check_floating(op, "masks", masks, 4)
    require(
        masks.shape[2] >= 1 and masks.shape[3] >= 1 and out_h >= 1 and out_w >= 1,
        f"{op}: mask and output sizes must be at least 1",
    )


def _corner_matrix(length: int, out: int, like: Tensor) -> Tensor:
    """(out, length) interpolation weights of the positions `i * length / out`."""
    position = torch.arange(out, dtype=like.dtype, device=like.device) * length / out
    valid = position <= length - 0.5
    position = position.clamp(max=length - 1)
    base = position.floor()
    frac = position - base
    matrix = like.new_zeros(out, length)
    matrix.scatter_add_(1, base.long()[:, None], (1 - frac)[:, None])
    matrix.scatter_add_(1, (base + 1).clamp(max=length - 1).long()[:, None], frac[:, None])
    return matrix * valid[:, None]


def _resize(masks: Tensor, out_h: int, out_w: int) -> Tensor:
    rows = _corner_matrix(masks.shape[2], out_h, masks)
    columns = _corner_matrix(masks.shape[3], out_w, masks)
    return rows @ masks @ columns.T


def _resize_transpose(grad: Tensor, height: int, width: int) -> Tensor:
    rows = _corner_matrix(height, grad.shape[2], grad)
    columns = _corner_matrix(width, grad.shape[3], grad)
    return rows.T @ grad @ columns


def mask_resize(masks, out_h, out_w) -> Tensor:
    """See `d2ext.ops.mask_resize`."""
    check_resize("mask_resize", masks, out_h, out_w)
    result = _resize(masks.to(accumulate_type(masks)), out_h, out_w)
    return result.to(masks.dtype).contiguous()


def mask_resize_backward(grad, mask_h, mask_w) -> Tensor:
    """Gradient of `mask_resize`: its transpose, (N, C, mask_h, mask_w)."""
    check_resize("mask_resize", grad, mask_h, mask_w)
    result = _resize_transpose(grad.to(accumulate_type(grad)), mask_h, mask_w)
    return result.to(grad.dtype).contiguous()


def check_gate(op: str, features: Tensor, masks: Tensor) -> None:
    check_floating(op, "features", features, 4)
    check_resize(op, masks, 1, 1)
    require(
        masks.shape[0] == features.shape[0]
        and masks.shape[1] == 1
        and masks.dtype == features.dtype
        and masks.device == features.device,
        f"{op}: masks must be (N, 1, M, M) with N, dtype and device of features",
    )


def mask_gate(features, masks) -> Tensor:
    """See `d2ext.ops.mask_gate`."""
    check_gate("mask_gate", features, masks)
    accumulate = accumulate_type(features)
    gate = _resize(masks.to(accumulate), features.shape[2], features.shape[3])
    result = (features.to(accumulate) * gate).to(features.dtype)
    return result.contiguous(memory_format=layout_of(features))


def mask_gate_backward(grad, features, masks) -> tuple[Tensor, Tensor]:
    """Gradients of `mask_gate` by `features` and `masks`."""
    check_gate("mask_gate", features, masks)
    require(grad.shape == features.shape, "mask_gate: grad must have the shape of features")
    accumulate = accumulate_type(features)
    grad = grad.to(accumulate)
    gate = _resize(masks.to(accumulate), features.shape[2], features.shape[3])
    by_features = (grad * gate).to(features.dtype)
    by_gate = (grad * features.to(accumulate)).sum(1, keepdim=True)
    by_masks = _resize_transpose(by_gate, masks.shape[2], masks.shape[3]).to(masks.dtype)
    return by_features.contiguous(memory_format=layout_of(features)), by_masks.contiguous()


# ------------------------------------------------------------------ paste
def check_paste(op: str, masks: Tensor, boxes: Tensor, img_h, img_w) -> None:
    check_floating(op, "masks", masks, 3)
    require(
        masks.shape[1] == masks.shape[2]
        and masks.shape[1] >= 1
        and masks.shape[1] <= MAX_MASK_SIZE,
        f"{op}: masks must be (N, M, M) with M in 1..{MAX_MASK_SIZE}",
    )
    check_coordinates(op, "boxes", boxes, 4, masks)
    require(boxes.shape[0] == masks.shape[0], f"{op}: as many boxes as masks are needed")
    require(img_h >= 1 and img_w >= 1, f"{op}: image sizes must be at least 1")


def _paste_matrix(low: Tensor, high: Tensor, image: int, size: int) -> Tensor:
    """(N, image, size) weights of mask cells for pixel centres along one axis, zeros outside."""
    pixel = torch.arange(image, dtype=low.dtype, device=low.device)[None] + 0.5
    position = (pixel - low[:, None]) / (high - low)[:, None] * size - 0.5
    valid = (position > -1) & (position < size)
    position = torch.where(valid, position, torch.zeros_like(position))
    base = position.floor()
    frac = position - base
    matrix = low.new_zeros(len(low), image, size)
    for cell, weight in ((base, 1 - frac), (base + 1, frac)):
        weight = torch.where(valid & (cell >= 0) & (cell < size), weight, torch.zeros_like(weight))
        matrix.scatter_add_(2, cell.clamp(0, size - 1).long()[..., None], weight[..., None])
    return matrix


def paste_masks(masks, boxes, img_h, img_w, *, threshold=0.5) -> Tensor:
    """See `d2ext.ops.paste_masks`."""
    check_paste("paste_masks", masks, boxes, img_h, img_w)
    as_bytes = threshold < 0
    shape = (len(masks), img_h, img_w)
    output = masks.new_zeros(shape, dtype=torch.uint8 if as_bytes else torch.bool)
    masks = masks.to(accumulate_type(masks))
    boxes = boxes.to(masks.dtype)
    solid = torch.isfinite(boxes).all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    step = max(1, _CHUNK_ELEMENTS // (img_h * img_w))
    for part in torch.nonzero(solid).flatten().split(step):
        size = masks.shape[1]
        box = boxes[part]
        rows = _paste_matrix(box[:, 1], box[:, 3], img_h, size)
        columns = _paste_matrix(box[:, 0], box[:, 2], img_w, size)
        value = rows @ masks[part] @ columns.mT
        if as_bytes:
            output[part] = (value * 255).clamp(0, 255).to(torch.uint8)
        else:
            output[part] = value >= threshold
    return output


# ------------------------------------------------------------------ vote
def check_vote(op, masks, boxes, index, offset, weight, img_h, img_w, mode) -> None:
    check_paste(op, masks, boxes, img_h, img_w)
    check_choice(op, "mode", mode, VOTE_MODES)
    require(
        index.dim() == 1 and index.dtype == torch.int32,
        f"{op}: cand_index must be one-dimensional int32",
    )
    require(
        offset.dim() == 1 and offset.dtype == torch.int32 and offset.shape[0] >= 1,
        f"{op}: cand_offset must be one-dimensional int32 with R + 1 entries",
    )
    require(
        weight.dim() == 1 and weight.shape[0] == index.shape[0] and weight.dtype == torch.float32,
        f"{op}: cand_weight must be float32 with an entry per candidate",
    )
    for tensor in (index, offset, weight):
        require(tensor.device == masks.device, f"{op}: all tensors must be on one device")


def _cells(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours and weight of positions clamped to `0..length-1`."""
    position = position.clamp(0, length - 1)
    base = position.floor()
    cell = base.long()
    return cell, (cell + 1).clamp(max=length - 1), position - base


def _bilinear(plane: Tensor, y: Tensor, x: Tensor, corner: bool) -> Tensor:
    """Samples at all (y, x). `corner` does not interpolate in the last row or column."""
    y0, y1, b = _cells(y, plane.shape[0])
    x0, x1, a = _cells(x, plane.shape[1])
    top = plane[y0][:, x0] * (1 - a) + plane[y0][:, x1] * a
    low = plane[y1][:, x0] * (1 - a) + plane[y1][:, x1] * a
    b = b[:, None]
    value = top * (1 - b) + low * b
    if corner:
        last = (y0 == plane.shape[0] - 1)[:, None] | (x0 == plane.shape[1] - 1)
        value = torch.where(last, plane[y0][:, x0], value)
    return value


def _span(low: float, high: float, image: int) -> tuple[int, int]:
    """Pixels `low <= x <= high` of an image as a half-open range."""
    first = max(0, -int(-max(low, -1.0) // 1)) if low < image else image
    last = min(image, int(min(high, float(image)) // 1) + 1) if high >= 0 else 0
    return first, max(first, last)


class _Voters:
    """Masks drawn into their boxes, each once."""

    def __init__(self, masks, boxes, img_h, img_w, thresh, mode) -> None:
        self.corner = mode == "mnc"
        self.thresh = thresh
        self.masks = masks
        self.boxes = boxes if self.corner else boxes.round()
        self.image = (img_h, img_w)
        self.drawn = {}

    def draw(self, voter: int) -> tuple[int, int, int, int, Tensor] | None:
        if voter not in self.drawn:
            self.drawn[voter] = self._draw(voter)
        return self.drawn[voter]

    def _draw(self, voter: int):
        box = self.boxes[voter]
        if not bool(torch.isfinite(box).all()):
            return None
        corners = box.tolist()
        first_x, last_x = _span(corners[0], corners[2], self.image[1])
        first_y, last_y = _span(corners[1], corners[3], self.image[0])
        if last_x <= first_x or last_y <= first_y:
            return None
        mask = self.masks[voter]
        y = self._positions(first_y, last_y, box[1], box[3], mask)
        x = self._positions(first_x, last_x, box[0], box[2], mask)
        value = _bilinear(mask, y, x, self.corner)
        if not self.corner:
            value = (value >= self.thresh).to(mask.dtype)
        return first_y, last_y, first_x, last_x, value

    def _positions(self, first: int, last: int, low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
        pixel = torch.arange(first, last, dtype=mask.dtype, device=mask.device)
        size, span = mask.shape[0], high - low + 1
        if self.corner:
            return (pixel - low) * size / span
        return (pixel - low + 0.5) * size / span - 0.5


def _tight_box(inside: Tensor, mode: str) -> list[int]:
    rows, columns = inside.any(1), inside.any(0)
    if not bool(rows.any()):
        height, width = inside.shape
        if mode == "crop":
            x, y = min(-(-width // 2), width - 1), min(-(-height // 2), height - 1)
        else:
            x, y = width // 2, height // 2
        return [x, y, x, y]
    y, x = torch.nonzero(rows).flatten(), torch.nonzero(columns).flatten()
    return [int(x[0]), int(y[0]), int(x[-1]), int(y[-1])]


def _recrop(total: Tensor, box: list[int], size: int, mode: str) -> Tensor:
    x1, y1, x2, y2 = box
    index = torch.arange(size, dtype=total.dtype, device=total.device)
    if mode == "mnc":
        x, y = x1 + index * (x2 - x1 + 1) / size, y1 + index * (y2 - y1 + 1) / size
        return _bilinear(total, y, x, True)
    x = (index + 0.5) * (x2 - x1 + 1) / size - 0.5
    y = (index + 0.5) * (y2 - y1 + 1) / size - 0.5
    if mode == "crop":
        return _bilinear(total[y1 : y2 + 1, x1 : x2 + 1], y, x, False)
    return _bilinear(total, y + y1, x + x1, False)


def mask_vote(
    masks, boxes, cand_index, cand_offset, cand_weight, img_h, img_w, *,
    binary_thresh=0.4, mode="fcis",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `d2ext.ops.mask_vote`."""
    op = "mask_vote"
    check_vote(op, masks, boxes, cand_index, cand_offset, cand_weight, img_h, img_w, mode)
    offsets, index = cand_offset.tolist(), cand_index.tolist()
    require(
        offsets[0] == 0 and offsets[-1] == len(index) and offsets == sorted(offsets),
        f"{op}: cand_offset must rise from 0 to the number of candidates",
    )
    require(
        not index or (min(index) >= 0 and max(index) < len(masks)),
        f"{op}: cand_index must lie in 0..N-1",
    )
    results = len(offsets) - 1
    compute = masks.to(accumulate_type(masks))
    voters = _Voters(compute, boxes.to(compute.dtype), img_h, img_w, binary_thresh, mode)
    weight = cand_weight.to(compute.dtype)
    out_masks = masks.new_zeros((results, *masks.shape[1:]))
    out_boxes = cand_index.new_zeros((results, 4))
    for result in range(results):
        total = compute.new_zeros((img_h, img_w))
        for entry in range(offsets[result], offsets[result + 1]):
            drawn = voters.draw(index[entry])
            if drawn is not None:
                y0, y1, x0, x1, value = drawn
                total[y0:y1, x0:x1] += weight[entry] * value
        inside = total > binary_thresh if mode == "mnc" else total >= binary_thresh
        box = _tight_box(inside, mode)
        out_boxes[result] = torch.tensor(box, dtype=torch.int32)
        out_masks[result] = _recrop(total, box, masks.shape[1], mode).to(masks.dtype)
    return out_masks, out_boxes
