"""From the third stage to the fourth (MNC paper, sections 4 and 5): every box is refined by the
deltas of one class, and the gradient of the later stages flows back through the refined box."""

import torch
from torch import Tensor

from d2ext.modeling.regions.boxes import ImageSize, clip_boxes
from d2ext.projects.mnc.gradient_limit import limit_gradient

from detectron2.modeling.box_regression import Box2BoxTransform


def choose_classes(probabilities: Tensor, foreground_only: bool) -> Tensor:
    """The class whose deltas refine a box.

    Args:
        probabilities: R x (K + 1) of the mask-level classifier, background last.
        foreground_only: the best foreground class even where background wins, as in the
            released training; otherwise the best of all.

    Returns:
        (R,) int64 in [0, K]; K, background, only without `foreground_only`.
    """
    candidates = probabilities[:, :-1] if foreground_only else probabilities
    return candidates.argmax(dim=1)


def pick_deltas(deltas: Tensor, classes: Tensor) -> Tensor:
    """Deltas (R x 4) of one class per box; zeros for background, which has none.

    Args:
        deltas: R x 4K.
        classes: (R,) int64 in [0, K].
    """
    by_class = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
    foreground = classes < by_class.shape[1]
    rows = torch.arange(deltas.shape[0], device=deltas.device)
    picked = by_class[rows, classes.clamp(max=by_class.shape[1] - 1)]
    return torch.where(foreground[:, None], picked, torch.zeros_like(picked))


def bridge_boxes(
    boxes: Tensor,
    deltas: Tensor,
    classes: Tensor,
    transform: Box2BoxTransform,
    image_size: ImageSize,
    gradient_limit: float | None = None,
) -> Tensor:
    """The boxes that the fourth stage starts from, in the order of those of the third.

    Differentiable in `boxes` and `deltas`; a coordinate clipped to the image has no gradient.

    Args:
        boxes: R x 4 in pixels of the network input, x2 and y2 exclusive.
        deltas: R x 4K.
        classes: (R,) the class to use, see `choose_classes`.
        transform: decoder of the deltas.
        image_size: (height, width) without padding; or those of every box, see `sizes_of_rows`.
        gradient_limit: see `limit_gradient`; acts on the gradient of `deltas` only.
    """
    picked = limit_gradient(pick_deltas(deltas, classes), gradient_limit)
    return clip_boxes(transform.apply_deltas(picked, boxes), image_size, whole_pixel=True)
