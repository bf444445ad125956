"""How the masks of an exported network come into the image; each scheme has a rule of its own."""

from collections.abc import Callable

from torch import Tensor

from d2ext.errors import UserError

from detectron2.structures import ROIMasks

# masks (N, M, M), boxes (N, 4), (height, width), threshold -> bool (N, height, width)
Drawing = Callable[[Tensor, Tensor, tuple[int, int], float], Tensor]

_DRAWINGS: dict[str, Drawing] = {}


def register_drawing(name: str) -> Callable[[Drawing], Drawing]:
    """Decorator: the rule that `ExportForm.drawing` names.

    The function gets masks (N, M, M) of 0..1, boxes (N, 4) in pixels of the image, continuous,
    (height, width) and the threshold; it returns bool masks (N, height, width).
    """

    def register(function: Drawing) -> Drawing:
        _DRAWINGS[name] = function
        return function

    return register


@register_drawing("detectron2")
def _detectron2(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    return ROIMasks(masks).to_bitmasks(boxes, *size, threshold).tensor


def draw_masks(
    name: str, masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Tensor:
    """Draw by the rule of a name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in _DRAWINGS:
        raise UserError(
            f"masks are to be drawn by the rule '{name}', which no installed project has; install "
            "the project that the model was exported with"
        )
    return _DRAWINGS[name](masks, boxes, size, threshold)
