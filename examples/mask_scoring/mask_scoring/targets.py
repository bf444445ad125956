"""What the MaskIoU head learns: the IoU of a predicted mask with the whole object."""

import torch
from torch import Tensor

from d2ext.errors import UserError

from detectron2.structures import BitMasks, Instances

_TINY = 1e-10


def _cover(low: Tensor, high: Tensor, length: int) -> Tensor:
    """N x length: how much of each pixel of a row lies between two coordinates."""
    start = torch.arange(length, device=low.device, dtype=low.dtype)
    return (torch.minimum(high[:, None], start + 1) - torch.maximum(low[:, None], start)).clamp(0)


def share_inside(masks: Tensor, boxes: Tensor) -> Tensor:
    """The part of each object that lies inside its box.

    Args:
        masks: N x H x W bool, objects in the image.
        boxes: N x 4 in pixels, x0 y0 x1 y1 in continuous coordinates; a pixel that a box cuts
            counts in part.

    Returns:
        N numbers in [0, 1]; 0 for an empty mask.
    """
    rows = _cover(boxes[:, 1], boxes[:, 3], masks.shape[1])
    columns = _cover(boxes[:, 0], boxes[:, 2], masks.shape[2])
    areas = boxes.new_zeros(len(masks))
    for i, mask in enumerate(masks):  # one by one: together they would be large as numbers
        areas[i] = rows[i] @ mask.to(boxes.dtype) @ columns[i]
    return areas / masks.flatten(1).sum(1).clamp(min=1)


@torch.no_grad()
def mask_iou_targets(masks: Tensor, regions: list[Instances]) -> Tensor:
    """IoU of masks predicted for regions with the objects that the regions are matched to.

    The masks are compared inside the box of the region, at their own resolution. The union also
    has the part of the object beyond the box, which follows from the share that lies inside.

    Args:
        masks: N x 1 x M x M probabilities, binarised at 0.5, of the regions of all images.
        regions: per image, with `proposal_boxes` and `gt_masks` (`BitMasks`).

    Returns:
        N numbers in [0, 1].

    Raises:
        UserError: the objects are polygons.
    """
    regions = [x for x in regions if len(x)]  # an image without objects has no `gt_masks`
    if not regions:
        return masks.new_zeros(0)
    if not all(isinstance(x.gt_masks, BitMasks) for x in regions):
        raise UserError(
            "Mask Scoring R-CNN needs objects as bitmaps: set INPUT.MASK_FORMAT=bitmask (yaml) or "
            "dataloader.train.mapper.mask_format=bitmask (lazy)"
        )
    boxes = [x.proposal_boxes.tensor for x in regions]
    pairs = list(zip(regions, boxes))
    shares = torch.cat([share_inside(x.gt_masks.tensor, b) for x, b in pairs])
    objects = torch.cat([x.gt_masks.crop_and_resize(b, masks.shape[-1]) for x, b in pairs])
    found = masks[:, 0] > 0.5
    both = (found & objects).sum((1, 2))
    whole = objects.sum((1, 2)) / shares.clamp(min=_TINY)
    return both / (found.sum((1, 2)) + whole - both).clamp(min=1)
