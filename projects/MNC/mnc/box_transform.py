"""Box deltas that keep gradient and precision, with the released decoder as an option."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import to_device
from d2ext.modeling.regions.refinement import encode_boxes

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes


class MNCBoxTransform(Box2BoxTransform):
    """detectron2's box transform for boxes that are part of the graph.

    Single-precision and double-precision deltas keep their type; lower ones become single.
    """

    def __init__(self, weights: Sequence[float], plus_one: bool = False, **kwargs):
        """
        Args:
            weights: factors of (dx, dy, dw, dh), the reciprocals of the standard deviations.
            plus_one: decode as MNC's release does, which takes the exclusive right and
                bottom edge for the index of the last pixel: the box grows by one pixel each time.
            kwargs: `scale_clamp` of the base class.
        """
        super().__init__(tuple(weights), **kwargs)
        self.plus_one = plus_one

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """As in the base class, which also asks the device whether the sources have an area."""
        return encode_boxes(src_boxes, target_boxes, self.weights)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Deltas (N x 4k) of boxes (N x 4) -> decoded boxes (N x 4k)."""
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        deltas = deltas.to(dtype).unflatten(1, (deltas.shape[1] // 4, 4))
        deltas = deltas / to_device(np.array(self.weights), deltas.device).to(dtype)
        low, high = boxes.to(dtype)[:, None].split(2, dim=2)
        size = high - low
        center = low + size / 2 + deltas[..., :2] * size
        half = size / 2 * deltas[..., 2:].clamp(max=self.scale_clamp).exp()
        return torch.cat([center - half, center + half + float(self.plus_one)], dim=2).flatten(1)


def exact_boxes(boxes: Tensor) -> Boxes:
    """`Boxes` around the very tensor: the constructor would round double to single precision."""
    wrapped = Boxes(boxes)
    wrapped.tensor = boxes
    return wrapped
