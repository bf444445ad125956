"""From scored regions at network resolution to instances in the image: voting and pasting."""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.ops import MaskVoting, paste_masks
from d2ext.structures import to_continuous, to_inclusive

from detectron2.structures import Boxes, Instances

__all__ = ["paste_instances", "paste_inclusive", "scale_boxes", "vote_instances"]

Size = Tuple[int, int]


def scale_boxes(boxes: Tensor, image_size: Size, output_size: Size) -> Tensor:
    """Continuous boxes (R x 4) of the network input -> first and last pixels in the output image.

    As in the release, the pixel indices are divided by the scale without a half-pixel shift, are
    not rounded, and are clipped to the output image.
    """
    (height, width), (out_height, out_width) = image_size, output_size
    scale = boxes.new_tensor([out_width / width, out_height / height]).repeat(2)
    last = boxes.new_tensor([out_width - 1, out_height - 1]).repeat(2)
    return torch.minimum((to_inclusive(boxes) * scale).clamp(min=0), last)


def paste_inclusive(masks: Tensor, boxes: Tensor, image_size: Size, threshold: float) -> Tensor:
    """Draw masks into images as in the release: bilinear, without a fall-off at the mask's border.

    Args:
        masks (Tensor): R x M x M probabilities.
        boxes (Tensor): R x 4 first and last pixels; they are rounded.
        image_size: height, width.
        threshold (float): values from it on are part of the object.

    Returns:
        Tensor: R x height x width, bool; nothing outside the boxes.
    """
    # paste_masks fades masks out to zero around them: give it a border of repeated cells, and cut
    # off what that adds.
    boxes = to_continuous(boxes.to(masks.dtype).round())
    cell = (boxes[:, 2:] - boxes[:, :2]) / masks.shape[-1]
    wider = torch.cat([boxes[:, :2] - cell, boxes[:, 2:] + cell], dim=1)
    padded = F.pad(masks[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    pasted = paste_masks(padded.contiguous(), wider, image_size, threshold=threshold)
    x, y = (torch.arange(n, device=boxes.device) for n in (image_size[1], image_size[0]))
    inside_x = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])
    inside_y = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])
    return pasted & inside_x[:, None, :] & inside_y[:, :, None]


def vote_instances(
    boxes: Tensor, class_probs: Tensor, masks: Tensor, output_size: Size, voting: MaskVoting
) -> Instances:
    """Detections of one image from all its scored regions.

    Args:
        boxes (Tensor): R x 4 first and last pixels in the output image.
        class_probs (Tensor): R x K probabilities of the foreground classes.
        masks (Tensor): R x P x P mask probabilities.
        output_size: height and width of the output image.
        voting: chooses seeds and merges masks; its threshold makes the final masks, too.

    Returns:
        Instances: ``pred_boxes`` (tight around the voted masks, continuous), ``scores``,
        ``pred_classes``, ``pred_masks`` (bool, at ``output_size``).
    """
    voted = voting(boxes.float(), masks.float(), class_probs, output_size)
    result = Instances(output_size)
    result.pred_boxes = Boxes(to_continuous(voted.boxes.float()))
    result.scores = voted.scores
    result.pred_classes = voted.classes
    result.pred_masks = paste_inclusive(
        voted.masks, voted.boxes, output_size, voting.binary_threshold
    )
    return result


def paste_instances(detected: Instances, output_size: Size, threshold: float) -> Instances:
    """Detections with region masks (``pred_masks`` R x 1 x P x P) at network resolution -> in the
    output image, ``pred_masks`` bool. Other fields are kept; nothing is dropped."""
    fields = detected.get_fields()
    boxes = scale_boxes(detected.pred_boxes.tensor, detected.image_size, output_size)
    result = Instances(output_size, **{k: v for k, v in fields.items() if k != "pred_masks"})
    result.pred_boxes = Boxes(to_continuous(boxes.round()))
    result.pred_masks = paste_inclusive(
        detected.pred_masks[:, 0].float(), boxes, output_size, threshold
    )
    return result
