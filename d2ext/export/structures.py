"""What the forms of detectors hand to each other."""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from d2ext.errors import UserError

OUTPUTS = ("boxes", "scores", "classes", "masks")


class Corners(NamedTuple):
    """Boxes as poolers take them; detectron2's `Boxes` asks whether there are any."""

    tensor: Tensor


class Detections(NamedTuple):
    """What is found in an image.

    Attributes:
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the output image, continuous.
        scores: (N,).
        classes: (N,) int64.
        masks: (N, M, M) values in 0..1 inside the boxes, to be drawn into the image.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor

    def rows(self, kept: Tensor) -> "Detections":
        """Those of which a bool vector is true."""
        index = kept.nonzero()[:, 0]
        return Detections(*(x[index] for x in self))


class Inputs(NamedTuple):
    """An image, prepared.

    Attributes:
        images: 1 x 3 x H x W, normalised and padded.
        size: (2,) int64, height and width without padding.
        output_size: (2,) int64, height and width of the output image.
    """

    images: Tensor
    size: Tensor
    output_size: Tensor

    @property
    def extent(self) -> Tensor:
        """(4,) float32: width, height, width, height without padding."""
        return self.size.to(torch.float32).flip(0).repeat(2)

    @property
    def output_extent(self) -> Tensor:
        """The same of the output image."""
        return self.output_size.to(torch.float32).flip(0).repeat(2)

    def output_sides(self) -> tuple[Any, Any]:
        """Height and width of the output image as numbers, for tensors of this size."""
        if torch.jit.is_tracing():
            return self.output_size[0], self.output_size[1]  # tensors stand for sizes there
        height, width = self.output_size.tolist()
        for side in (height, width):
            torch._check(side >= 1)
        return height, width

    def clip(self, boxes: Tensor, whole_pixel: bool = False) -> Tensor:
        """Boxes (..., 4) inside the network input, as `clip_boxes` of d2ext.modeling does it."""
        margin = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]) if whole_pixel else 0.0
        high = self.extent - (boxes.new_tensor([1.0, 1.0, 0.0, 0.0]) if whole_pixel else 0.0)
        low = torch.zeros_like(high) + margin
        return torch.minimum(torch.maximum(boxes, low), high)


def refuse(what: str, mend: str = "") -> NoReturn:
    """Raise the `UserError` of something that cannot be exported."""
    raise UserError(f"{what} cannot be exported{f'; {mend}' if mend else ''}")
