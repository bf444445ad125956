"""Pictures of ground truth and predictions, as uint8 RGB arrays."""

from d2ext import compat

compat.patch_visualization()

from .instances import (  # noqa: E402
    display_scale,
    draw_ground_truth,
    draw_predictions,
    draw_stages,
)
from .panels import side_by_side  # noqa: E402

__all__ = [
    "display_scale",
    "draw_ground_truth",
    "draw_predictions",
    "draw_stages",
    "side_by_side",
]
