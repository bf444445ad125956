"""Pictures of ground truth and predictions, as uint8 RGB arrays."""

from d2ext import compat

compat.patch_visualization()

from d2ext.visualization.instances import (
    draw_ground_truth,
    draw_predictions,
    draw_semantic,
    draw_stages,
    draw_training_input,
    training_image,
)
from d2ext.visualization.overlay import display_scale, resized
from d2ext.visualization.panels import PictureStems, panel_scale, picture_stems, side_by_side

__all__ = [
    "PictureStems",
    "display_scale",
    "draw_ground_truth",
    "draw_predictions",
    "draw_semantic",
    "draw_stages",
    "draw_training_input",
    "panel_scale",
    "picture_stems",
    "resized",
    "side_by_side",
    "training_image",
]
