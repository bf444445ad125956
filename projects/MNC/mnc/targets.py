"""Classes at the mask level: whether the predicted mask of a box is good enough for the box to
count as its class (MNC paper, section 3.3).

Masks and boxes are those of the network input. The release computes at the original size of the
image; the difference is one of rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.regions.boxes import pixel_boxes

from detectron2.structures import Instances


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


@torch.no_grad()
def mask_level_classes(
    probabilities: Tensor,
    samples: Sequence[Instances],
    masks: Sequence[Tensor],
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
    classes, start = [], 0
    for sample, image_masks in zip(samples, masks):
        rows = sample.foreground.nonzero()[:, 0]
        ious = mask_ious(
            probabilities[start + rows, 0],
            sample.proposal_boxes.tensor[rows],
            image_masks,
            sample.gt_index[rows],
            threshold,
        )
        good = rows[ious >= min_iou]
        image_classes = torch.full_like(sample.gt_classes, num_classes)
        image_classes[good] = sample.gt_classes[good]
        classes.append(image_classes)
        start += len(sample)
    return torch.cat(classes)
