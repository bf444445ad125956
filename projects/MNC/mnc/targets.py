"""Targets that depend on masks: the mask of each box to learn, and whether the predicted mask of a
box is good enough for the box to count as its class (MNC paper, sections 3.2 and 3.3).

Masks and boxes are those of the network input. The release computes both at the original size of
the image; the difference is one of rounding.
"""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.structures import to_inclusive

from detectron2.structures import BitMasks, Instances

__all__ = ["gt_bitmaps", "mask_ious", "mask_targets", "pixel_boxes"]


def gt_bitmaps(target: Instances) -> Tensor:
    """Ground-truth masks of an image, bool (G, H, W); images without objects may lack the field."""
    device = target.gt_classes.device
    if not target.has("gt_masks"):
        return torch.zeros((0, *target.image_size), dtype=torch.bool, device=device)
    masks = target.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *target.image_size)
    return masks.tensor.to(device)


def pixel_boxes(boxes: Tensor) -> Tensor:
    """Boxes (N x 4, x2 and y2 exclusive) -> int64 indices of their first and last pixels; halves
    are rounded to even. No box is smaller than one pixel."""
    low, high = to_inclusive(boxes.detach()).round().long().split(2, dim=1)
    return torch.cat([low, torch.maximum(low, high)], dim=1)


def _axis(first: Tensor, last: Tensor, size: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Pixels before and after each of ``size`` samples between two pixels, and the position between
    them: half-pixel centres, the outermost pixels repeated."""
    length = (last - first + 1)[:, None]
    sample = torch.arange(size, device=first.device, dtype=torch.float32) + 0.5
    position = (sample * length / size - 0.5).clamp(min=0)
    position = torch.minimum(position, (length - 1).float())
    before = position.floor().long()
    after = torch.minimum(before + 1, length - 1)
    return first[:, None] + before, first[:, None] + after, position - before


def mask_targets(
    masks: Tensor, gt_index: Tensor, boxes: Tensor, size: int, threshold: float = 0.4
) -> Tensor:
    """The part of each box's ground-truth mask inside the box, resized.

    Bilinear without antialiasing: of a large box, single pixels are looked at.

    Args:
        masks (Tensor): G x H x W, bool.
        gt_index (Tensor): (Q,) int64 row of each box's mask.
        boxes (Tensor): Q x 4 in pixels, x2 and y2 exclusive; zeros outside the image.
        size (int): M.
        threshold (float): resized values from here on belong to the mask.

    Returns:
        Tensor: Q x M x M, bool.
    """
    if len(boxes) == 0:  # then there may be no mask to look at, either
        return masks.new_zeros((0, size, size))
    corners = pixel_boxes(boxes)
    left, right, a = _axis(corners[:, 0], corners[:, 2], size)
    top, bottom, b = _axis(corners[:, 1], corners[:, 3], size)
    height, width = masks.shape[-2:]

    def look_up(y: Tensor, x: Tensor) -> Tensor:
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
        y, x = y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None]
        return (masks[gt_index[:, None, None], y, x] & inside).float()

    a, b = a[:, None], b[:, :, None]
    upper = look_up(top, left) * (1 - a) + look_up(top, right) * a
    lower = look_up(bottom, left) * (1 - a) + look_up(bottom, right) * a
    return upper * (1 - b) + lower * b >= threshold


def mask_ious(
    probabilities: Tensor, boxes: Tensor, masks: Tensor, gt_index: Tensor, threshold: float = 0.4
) -> Tensor:
    """IoU of predicted masks with the *whole* ground-truth masks, also what lies outside the box.

    Args:
        probabilities (Tensor): Q x M x M.
        boxes (Tensor): Q x 4 in pixels, x2 and y2 exclusive.
        masks (Tensor): G x H x W, bool.
        gt_index (Tensor): (Q,) int64 row of each box's mask.
        threshold (float): resized probabilities from here on belong to the mask.

    Returns:
        Tensor: (Q,) float32.
    """
    ious = torch.zeros(len(boxes), device=boxes.device)
    if len(boxes) == 0:
        return ious
    areas = masks.sum(dim=(1, 2))[gt_index]
    height, width = masks.shape[-2:]
    probabilities = probabilities.detach().float()
    for row, (x1, y1, x2, y2) in enumerate(pixel_boxes(boxes).tolist()):
        size = (y2 - y1 + 1, x2 - x1 + 1)
        predicted = F.interpolate(
            probabilities[row][None, None], size, mode="bilinear", align_corners=False
        )[0, 0]
        predicted = predicted >= threshold
        top, left, bottom, right = max(y1, 0), max(x1, 0), min(y2 + 1, height), min(x2 + 1, width)
        both = 0
        if top < bottom and left < right:
            inside = predicted[top - y1 : bottom - y1, left - x1 : right - x1]
            both = (inside & masks[gt_index[row], top:bottom, left:right]).sum()
        union = predicted.sum() + areas[row] - both
        ious[row] = both / union.clamp(min=1)
    return ious
