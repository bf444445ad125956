"""Moving boxes by predicted deltas between the stages of a cascade."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2ext.modeling.regions.boxes import clip_boxes, not_finite

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes


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

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """As in the base class: deltas (N x 4k), boxes (N x 4) -> decoded boxes (N x 4k)."""
        deltas = deltas.float()
        smallest = deltas.new_tensor(
            [-float("inf"), -float("inf")] + [-self.scale_clamp * w for w in self.weights[2:]]
        )
        limited = torch.maximum(deltas, smallest.repeat(deltas.shape[1] // 4))
        return super().apply_deltas(limited, boxes)


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
    rows = decoded.split([len(b) for b in boxes])
    return [Boxes(clip_boxes(image_boxes, size)) for image_boxes, size in zip(rows, image_sizes)]
