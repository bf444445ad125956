"""Losses of a pass. Each is averaged within every image, then over the images, so that an image
counts the same whatever the number of its boxes; the release processes one image at a time.

Shape shorthand: B images, R boxes of all images, K classes, M mask size.
"""

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.regions.losses import global_mean_count
from d2ext.projects.mnc.stage_bridge import pick_deltas

from detectron2.modeling.box_regression import Box2BoxTransform


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def image_mean(values: Tensor, image: Tensor, counts: Tensor) -> Tensor:
    """Sum of the values of each image divided by its count, averaged over all images.

    Args:
        values: (R,).
        image: (R,) int64, the image of each value.
        counts: (B,) what to divide the sum of each image by; 0 counts as 1. Images without
            values contribute 0.
    """
    # Processes may hold different numbers of images.
    images = global_mean_count(len(counts), values.device)
    return (values / counts.clamp(min=1)[image]).sum() / images.to(values.dtype)


def class_loss(logits: Tensor, classes: Tensor, image: Tensor, rows: Tensor) -> Tensor:
    """Softmax cross-entropy.

    Args:
        logits: R x (K + 1), background last.
        classes: (R,) int64 in [0, K].
        image: (R,) int64.
        rows: (B,) number of boxes of each image.
    """
    values = F.cross_entropy(_precise(logits), classes, reduction="none")
    return image_mean(values, image, rows)


def box_loss(
    deltas: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    classes: Tensor,
    transform: Box2BoxTransform,
    beta: float,
    image: Tensor,
    rows: Tensor,
    foreground: Tensor | None = None,
) -> Tensor:
    """Smooth L1 over the four deltas of the true class of foreground boxes, divided by the number
    of *all* boxes of the image. The boxes are constants here.

    Args:
        deltas: R x 4K.
        boxes, gt_boxes: R x 4.
        classes: (R,) int64 in [0, K].
        transform: encodes the targets.
        beta: where L2 turns to L1.
        image, rows: as in `class_loss`.
        foreground: (Q,) rows of the foreground boxes, where they are known.
    """
    if foreground is None:
        foreground = (classes < deltas.shape[1] // 4).nonzero()[:, 0]
    with torch.no_grad():
        targets = transform.get_deltas(boxes[foreground], gt_boxes[foreground])
    predicted = _precise(pick_deltas(deltas, classes)[foreground])
    values = smooth_l1_loss(predicted, targets, beta, reduction="none").sum(dim=1)
    return image_mean(values, image[foreground], rows)


def mask_loss(logits: Tensor, targets: Tensor, foreground: Tensor, image: Tensor, images: int):
    """Binary cross-entropy, mean over the pixels of the foreground boxes of an image.

    Args:
        logits: R x 1 x M x M.
        targets: Q x M x M, bool, of the Q foreground boxes in their order.
        foreground: (Q,) rows of these, or (R,) bool.
        image: (R,) int64.
        images: B.
    """
    picked = _precise(logits[foreground, 0])
    values = F.binary_cross_entropy_with_logits(picked, targets.to(picked.dtype), reduction="none")
    image = image[foreground]
    counts = image.new_zeros(images).index_add(0, image, torch.ones_like(image))
    return image_mean(values.flatten(1).mean(dim=1), image, counts)
