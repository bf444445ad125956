"""Classes at the mask level: whether the predicted mask of a box is good enough for the box to
count as its class (MNC paper, section 3.3).

Masks and boxes are those of the network input. The release computes at the original size of the
image; the difference is one of rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2ext.modeling.regions.boxes import pixel_boxes
from d2ext.modeling.regions.samples import positive_rows
from d2ext.modeling.regions.targets import PackedMasks, pack_masks

from detectron2.structures import Instances

GROUPS = 2  # of regions of about one size, each looked at in one go


def mask_ious(
    probabilities: Tensor, boxes: Tensor, masks: Tensor, gt_index: Tensor, threshold: float = 0.4
) -> Tensor:
    """IoU of predicted masks with the *whole* ground-truth masks, also what lies outside the box.

    Args:
        probabilities: Q x M x M.
        boxes: Q x 4 in pixels, x2 and y2 exclusive.
        masks: G x H x W, bool.
        gt_index: (Q,) int64 row of each box's mask.
        threshold: resized probabilities from here on belong to the mask.

    Returns:
        (Q,) float32.
    """
    if len(boxes) == 0:
        return torch.zeros(0, device=boxes.device)
    first, last = pixel_boxes(boxes).split(2, dim=1)
    sides = last - first + 1
    # Regions are looked at in the extent of the largest one; so small ones with small ones.
    groups = sides.prod(dim=1).argsort().tensor_split(GROUPS)
    groups = [rows for rows in groups if len(rows)]
    extents = torch.stack([sides[rows].amax(dim=0) for rows in groups]).tolist()
    areas, ious = _count(masks), torch.empty(len(boxes), device=boxes.device)
    for rows, (width, height) in zip(groups, extents):
        (x0, y0), (w, h) = (v[rows].split(1, dim=1) for v in (first, sides))
        # Half precision would move pixels across the threshold.
        with torch.autocast(boxes.device.type, enabled=False):
            cells = probabilities[rows].detach().float()
            across = _weights(w, width, cells.shape[2])
            down = _weights(h, height, cells.shape[1])
            predicted = down @ (cells @ across.transpose(1, 2)) >= threshold
        x, x_in_box, x_in_image = _pixels(x0, w, width, masks.shape[2])
        y, y_in_box, y_in_image = _pixels(y0, h, height, masks.shape[1])
        drawn = predicted & (y_in_box[..., None] & x_in_box[:, None])
        index = gt_index[rows]
        truth = masks[index[:, None, None], y[..., None], x[:, None]]
        both = _count(drawn & truth & (y_in_image[..., None] & x_in_image[:, None]))
        ious[rows] = both / (_count(drawn) + areas[index] - both).clamp(min=1)
    return ious


def _count(masks: Tensor) -> Tensor:
    """Pixels of each bool mask (N x H x W), int32; torch widens bool to int64 before it adds."""
    return masks.flatten(1).view(torch.uint8).sum(dim=1, dtype=torch.int32)


def _weights(sides: Tensor, extent: int, size: int) -> Tensor:
    """Weights (Q x extent x size) with which the pixels of boxes take `size` mask cells: bilinear,
    with half-pixel centres.

    Args:
        sides: Q x 1 int64, the lengths of the boxes in pixels.
        extent: number of pixels.
    """
    pixel = torch.arange(extent, device=sides.device)
    position = ((size / sides.float()) * (pixel + 0.5) - 0.5).clamp(0, size - 1)
    cell = torch.arange(size, device=sides.device)
    return (1 - (position[..., None] - cell).abs()).clamp(min=0)


def _pixels(first: Tensor, sides: Tensor, count: int, extent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q x count each: indices of pixels from `first` (Q x 1) on, and whether the boxes and whether
    the image, of `extent` pixels, have them."""
    number = torch.arange(count, device=first.device)
    pixel = first + number
    return pixel.clamp(0, extent - 1), number < sides, (pixel >= 0) & (pixel < extent)


@torch.no_grad()
def mask_level_classes(
    probabilities: Tensor,
    samples: Sequence[Instances],
    masks: PackedMasks | Sequence[Tensor],
    num_classes: int,
    threshold: float,
    min_iou: float,
) -> Tensor:
    """(R,) int64, the class of each box whose predicted mask is good enough, else `num_classes`.

    Args:
        probabilities: R x 1 x M x M, of the boxes of all images.
        samples: per image, from `MNCSampler`.
        masks: per image, the ground-truth masks (bool, G x H x W).
        threshold: see `mask_ious`.
        min_iou: least IoU of predicted mask and ground truth.
    """
    masks = pack_masks(masks)
    rows, counts = positive_rows(samples, num_classes)
    ious = mask_ious(
        probabilities[rows, 0],
        torch.cat([s.proposal_boxes.tensor for s in samples])[rows],
        masks.masks,
        masks.rows([s.gt_index[:n] for s, n in zip(samples, counts)]),
        threshold,
    )
    classes = torch.cat([s.gt_classes for s in samples])
    found = classes[rows].masked_fill(ious < min_iou, num_classes)
    return torch.full_like(classes, num_classes).index_copy(0, rows, found)
