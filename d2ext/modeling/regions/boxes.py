"""Two conventions for the corners of a box, and clipping that keeps gradients.

detectron2 counts *continuous* coordinates: pixel x covers x to x + 1, and a box that holds the
pixels 3..5 is (3, 6). The Caffe and MXNet releases of Faster R-CNN, MNC and FCIS name the first and
last pixel, here (3, 5), so that a width is `x2 - x1 + 1`. Widths, IoUs and regression deltas are
equal in both, hence conversion is only needed where corners are rounded or compared with pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import to_device


def _with_shifted_end(boxes: Tensor, shift: float) -> Tensor:
    return boxes + boxes.new_tensor([0.0, 0.0, shift, shift])


def to_inclusive(boxes: Tensor) -> Tensor:
    """Continuous boxes (... x 4, floating) -> first and last pixel, x1, y1, x2, y2."""
    return _with_shifted_end(boxes, -1.0)


def to_continuous(boxes: Tensor) -> Tensor:
    """Boxes given by their first and last pixel (... x 4, floating) -> detectron2's corners."""
    return _with_shifted_end(boxes, 1.0)


def pixel_boxes(boxes: Tensor) -> Tensor:
    """Continuous boxes (N x 4) -> int64 indices of their first and last pixels; halves are rounded
    to even. No box is smaller than one pixel."""
    low, high = to_inclusive(boxes.detach()).round().long().split(2, dim=1)
    return torch.cat([low, torch.maximum(low, high)], dim=1)


# Height and width in pixels; numbers, or for boxes of several images one of each for every box.
ImageSize = tuple[int, int] | tuple[np.ndarray, np.ndarray]


def sizes_of_rows(image_sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> ImageSize:
    """The image size of every box, if `counts` of them are in each image."""
    heights, widths = np.array(image_sizes).repeat(counts, axis=0).T
    return heights, widths


def clip_boxes(boxes: Tensor, image_size: ImageSize, *, whole_pixel: bool = False) -> Tensor:
    """Boxes inside an image, as a new tensor through which gradients flow.

    Args:
        boxes: ... x 4, continuous corners.
        image_size: height and width in pixels.
        whole_pixel: clip as the releases do, first and last pixel each to the image; a box
            outside of it then keeps the pixel nearest to it, instead of ending up empty.

    Returns:
        ... x 4. The gradient of a corner that is moved is 0.
    """
    height, width = image_size
    margin = 1 if whole_pixel else 0
    high = np.stack([width - margin, height - margin, width, height], axis=-1)
    low = np.broadcast_to([0, 0, margin, margin], high.shape)
    low, high = to_device(np.stack([low, high]), boxes.device).to(boxes.dtype)
    return boxes.clamp(low, high)


def boxes_inside(boxes: Tensor, image_size: ImageSize) -> Tensor:
    """(N,) bool, whether boxes (N x 4, continuous corners) lie within an image of (height, width);
    they may touch its border."""
    limits = to_device(np.stack(image_size[::-1], axis=-1), boxes.device)
    return (boxes[:, :2] >= 0).all(dim=1) & (boxes[:, 2:] <= limits).all(dim=1)


def not_finite(what: str, *values: Tensor) -> FloatingPointError:
    """The error to raise where `what`, computed from `values`, contains Inf or NaN."""
    device = values[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if torch.bfloat16 in (autocast, *(x.dtype for x in values)):
        return FloatingPointError(
            f"{what} contain Inf or NaN in bfloat16, which torch's convolutions of very small maps "
            "can give by themselves: use float32, or larger images or layers."
        )
    return FloatingPointError(
        f"{what} contain Inf or NaN: training diverged, lower the learning rate."
    )
