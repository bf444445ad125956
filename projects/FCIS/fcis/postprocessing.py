"""From scored regions at network resolution to instances in the image: voting and pasting.

Boxes are first and last pixels here, as in the release, up to the results."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.regions.boxes import to_continuous
from d2ext.ops import MaskVoting, paste_masks

from detectron2.structures import Boxes, Instances

Size = tuple[int, int]


def scale_boxes(boxes: Tensor, image_size: Size, output_size: Size) -> Tensor:
    """Boxes (R x 4) of the network input -> in the output image.

    As in the release, indices of pixels are divided by the scale without a half-pixel shift, not
    rounded, and clipped to the output image.
    """
    (height, width), (out_height, out_width) = image_size, output_size
    scale = boxes.new_tensor([out_width / width, out_height / height]).repeat(2)
    last = boxes.new_tensor([out_width - 1, out_height - 1]).repeat(2)
    return torch.minimum((boxes * scale).clamp(min=0), last)


def place_masks(result: Instances, masks: Tensor, boxes: Tensor, threshold: float) -> Instances:
    """Give a result its `pred_boxes` (continuous) and `pred_masks` (bool, R x height x width).

    Masks are drawn as in the release: bilinear, without a fall-off at the mask's border.

    Args:
        result: tells the size of the image.
        masks: R x M x M probabilities.
        boxes: R x 4; they are rounded, and nothing is drawn outside of them.
        threshold: values from it on are part of the object.
    """
    # paste_masks fades masks out to zero around them: give it a border of repeated cells, and cut
    # off what that adds.
    boxes = to_continuous(boxes.to(masks.dtype).round())
    cell = (boxes[:, 2:] - boxes[:, :2]) / masks.shape[-1]
    wider = torch.cat([boxes[:, :2] - cell, boxes[:, 2:] + cell], dim=1)
    padded = F.pad(masks[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    pasted = paste_masks(padded.contiguous(), wider, result.image_size, threshold=threshold)
    y, x = (torch.arange(n, device=boxes.device) for n in result.image_size)
    inside_x = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])
    inside_y = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])
    result.pred_boxes = Boxes(boxes)
    result.pred_masks = pasted & inside_x[:, None, :] & inside_y[:, :, None]
    return result


def vote_instances(
    boxes: Tensor, class_probs: Tensor, masks: Tensor, output_size: Size, voting: MaskVoting
) -> Instances:
    """Detections of one image from all its scored regions.

    Args:
        boxes: R x 4 in the output image.
        class_probs: R x K probabilities of the foreground classes.
        masks: R x P x P mask probabilities.
        output_size: height and width of the output image.
        voting: chooses seeds and merges masks; its threshold makes the final masks, too.

    Returns:
        `pred_boxes` (tight around the voted masks, continuous), `scores`,
        `pred_classes`, `pred_masks` (bool, at `output_size`).
    """
    voted = voting(boxes.float(), masks.float(), class_probs, output_size)
    result = Instances(output_size, scores=voted.scores, pred_classes=voted.classes)
    return place_masks(result, voted.masks, voted.boxes, voting.binary_threshold)


def paste_instances(detected: Instances, output_size: Size, threshold: float) -> Instances:
    """Detections at network resolution, see `FCISROIHeads.predict` -> in the output image,
    with `pred_masks` bool. Other fields are kept; nothing is dropped."""
    fields = detected.get_fields()
    at_network = ("pixel_boxes", "pred_boxes", "pred_masks")
    result = Instances(output_size, **{k: v for k, v in fields.items() if k not in at_network})
    boxes = scale_boxes(detected.pixel_boxes, detected.image_size, output_size)
    return place_masks(result, detected.pred_masks[:, 0].float(), boxes, threshold)
