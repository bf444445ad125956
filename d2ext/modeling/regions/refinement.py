"""Moving boxes by predicted deltas between the stages of a cascade."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import to_device
from d2ext.modeling.regions.boxes import clip_boxes, not_finite, sizes_of_rows

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes


def encode_boxes(sources: Tensor, targets: Tensor, weights: Sequence[float]) -> Tensor:
    """The deltas (N x 4) that turn sources into targets (N x 4 each), times the weights."""
    size, wanted = (x[:, 2:] - x[:, :2] for x in (sources, targets))
    shift = (targets[:, :2] + 0.5 * wanted) - (sources[:, :2] + 0.5 * size)
    weights = to_device(np.array(weights), sources.device).to(sources.dtype)
    return torch.cat([weights[:2] * shift / size, weights[2:] * torch.log(wanted / size)], dim=1)


class ClampedBox2BoxTransform(Box2BoxTransform):
    """detectron2's box transform with the log-size terms limited on both sides.

    detectron2 limits growth to a factor of 1000/16 but not shrinking; MMDetection limits both, so
    that a box never degenerates to nothing.
    """

    def __init__(self, weights: Sequence[float], **kwargs):
        """
        Args:
            weights: factors of (dx, dy, dw, dh), the reciprocals of the standard deviations.
            kwargs: `scale_clamp` of the base class (log of the largest change in size).
        """
        super().__init__(tuple(weights), **kwargs)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """As in the base class, which also asks the device whether the sources have an area."""
        return encode_boxes(src_boxes, target_boxes, self.weights)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """As in the base class: deltas (N x 4k), boxes (N x 4) -> decoded boxes (N x 4k)."""
        deltas = deltas.float().unflatten(1, (deltas.shape[1] // 4, 4))
        low, high = boxes.to(deltas.dtype)[:, None].split(2, dim=2)
        size, weights = high - low, to_device(np.array(self.weights), deltas.device)
        shift, growth = (deltas / weights.to(deltas.dtype)).split(2, dim=2)
        center = shift * size + (low + 0.5 * size)
        half = 0.5 * (growth.clamp(-self.scale_clamp, self.scale_clamp).exp() * size)
        return torch.cat([center - half, center + half], dim=2).flatten(1)


@torch.no_grad()
def refine_boxes(
    boxes: Sequence[Boxes],
    deltas: Tensor,
    transform: Box2BoxTransform,
    image_sizes: Sequence[tuple[int, int]],
) -> list[Boxes]:
    """Decode one delta per box and clip the result to the image; the new boxes are constants.

    Args:
        boxes: per image, Ri boxes.
        deltas: (sum of Ri) x 4, class-agnostic or of the class already picked.
        transform: decoder of the deltas.
        image_sizes: (height, width) of each image without padding, in pixels.

    Returns:
        per image, Ri boxes. None is dropped, so rows stay aligned.

    Raises:
        FloatingPointError: if a decoded box is not finite.
    """
    decoded = transform.apply_deltas(deltas, torch.cat([b.tensor for b in boxes]))
    if not torch.isfinite(decoded).all():
        raise not_finite("Refined boxes", deltas)
    counts = [len(b) for b in boxes]
    clipped = clip_boxes(decoded, sizes_of_rows(image_sizes, counts))
    return [Boxes(image_boxes) for image_boxes in clipped.split(counts)]
