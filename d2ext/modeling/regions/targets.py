"""Mask targets: the part of a ground-truth mask inside a region, as a small bitmap.

Two ways lead to it: detectron2's and MMDetection's aligned average over each cell; and that of the
releases of MNC and FCIS, which resize the pixels inside the box, looking at single ones of a large
box.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.regions.batching import to_device

from detectron2.layers import ROIAlign
from detectron2.structures import BitMasks, Instances, PolygonMasks


def gt_bitmaps(target: Instances) -> Tensor:
    """Ground-truth masks of an image, bool (G, H, W); images without objects may lack the field."""
    device = target.gt_boxes.device
    if not target.has("gt_masks"):
        return torch.zeros((0, *target.image_size), dtype=torch.bool, device=device)
    masks = target.gt_masks
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *target.image_size)
    return masks.tensor.to(device)


class PackedMasks(NamedTuple):
    """Masks of all images, G x H x W bool, filled up to one size with background; and the row of
    each image's first mask."""

    masks: Tensor
    starts: list[int]

    def rows(self, gt_index: Sequence[Tensor]) -> Tensor:
        """(Q,) int64 rows, of rows (Qi,) among the masks of each image."""
        starts = np.repeat(self.starts, [len(index) for index in gt_index])
        return torch.cat(list(gt_index)) + to_device(starts, self.masks.device)


def pack_masks(masks: PackedMasks | Sequence[Tensor]) -> PackedMasks:
    """Per image G x H x W bool masks -> those of all images; packed ones are returned as they
    are."""
    if isinstance(masks, PackedMasks):
        return masks
    height, width = (max(m.shape[i] for m in masks) for i in (1, 2))
    padded = [
        m
        if m.shape[1:] == (height, width)
        else F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1]))
        for m in masks
    ]
    starts = np.cumsum([0, *(len(m) for m in masks)])[:-1]
    return PackedMasks(torch.cat(padded), starts.tolist())


def align_masks(
    gt_masks: BitMasks | PolygonMasks, gt_index: Tensor, boxes: Tensor, size: int
) -> Tensor:
    """The part of each region's ground-truth mask inside its box, as a bitmap.

    Equal to `gt_masks[gt_index].crop_and_resize(boxes, size)`, but bitmaps are not copied per
    region (128 regions of an 800 x 1333 image would take half a gigabyte).

    Args:
        gt_masks: M masks at network-input resolution.
        gt_index: (Q,) int64 row of each region's mask.
        boxes: Q x 4 in pixels, continuous corners.
        size: S.

    Returns:
        Q x S x S, bool.
    """
    if not isinstance(gt_masks, BitMasks):
        return gt_masks[gt_index].crop_and_resize(boxes, size).to(boxes.device)
    rows = gt_index[:, None].to(boxes.dtype)
    align = ROIAlign((size, size), 1.0, 0, aligned=True)
    return align(gt_masks.tensor[:, None].float(), torch.cat([rows, boxes], dim=1))[:, 0] >= 0.5


def resize_masks(
    masks: Tensor,
    gt_index: Tensor,
    boxes: Tensor,
    size: int,
    threshold: float,
    limits: Tensor | None = None,
) -> Tensor:
    """The pixels of each region's mask inside its box, resized and made binary.

    Bilinear with half-pixel centres and without antialiasing, as OpenCV resizes: of a large box,
    single pixels are looked at. What of a box lies outside of the image is background.

    Args:
        masks: G x H x W, bool or in [0, 1].
        gt_index: (Q,) int64 row of each box's mask.
        boxes: Q x 4 int64, first and last pixels.
        size: S.
        threshold: resized values from here on belong to the mask.
        limits: Q x 4 first and last pixels beyond which a mask counts as background.

    Returns:
        Q x S x S, bool.
    """
    if len(boxes) == 0:  # then there may be no mask to look at, either
        return masks.new_zeros((0, size, size), dtype=torch.bool)
    if limits is None:
        limits = boxes
    left, right, in_left, in_right, a = _axis(boxes, limits, 0, size, masks.shape[2])
    top, bottom, in_top, in_bottom, b = _axis(boxes, limits, 1, size, masks.shape[1])
    image = gt_index[:, None, None]

    def look_up(y: Tensor, in_y: Tensor, x: Tensor, in_x: Tensor) -> Tensor:
        found = masks[image, y[:, :, None], x[:, None]].float()
        return found * (in_y[:, :, None] & in_x[:, None])

    a, b = a[:, None], b[:, :, None]
    upper = look_up(top, in_top, left, in_left) * (1 - a)
    upper += look_up(top, in_top, right, in_right) * a
    lower = look_up(bottom, in_bottom, left, in_left) * (1 - a)
    lower += look_up(bottom, in_bottom, right, in_right) * a
    return upper * (1 - b) + lower * b >= threshold


def _axis(
    boxes: Tensor, limits: Tensor, axis: int, size: int, extent: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Along x (0) or y (1), Q x size each: pixels before and after each sample between the two ends
    of a box, the outermost repeated; whether they count; and the position between them."""
    first, last = boxes[:, axis, None], boxes[:, axis + 2, None]
    length = last - first + 1
    sample = torch.arange(size, device=boxes.device, dtype=torch.float32) + 0.5
    position = (sample * length / size - 0.5).clamp(min=0)
    position = torch.minimum(position, (length - 1).float())
    start = position.floor().long()
    pixels = torch.stack([start, torch.minimum(start + 1, length - 1)]) + first
    counts = (pixels >= limits[:, axis, None]) & (pixels <= limits[:, axis + 2, None])
    counts &= (pixels >= 0) & (pixels < extent)
    before, after = pixels.clamp(0, extent - 1)
    return before, after, counts[0], counts[1], position - start
