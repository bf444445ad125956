"""Masks, boxes and labels over an image.

By OpenCV and Pillow, in place. detectron2's `Visualizer` fills the holes of masks, and on a
photograph of 6000x4000 with 13 objects its figure took 5 times the memory and 8 times as long.
"""

import colorsys
from collections.abc import Sequence
from typing import Any, cast

import cv2
import numpy as np

from d2ext.errors import UserError
from d2ext.visualization.text import draw_label, place_labels, text_size

Color = tuple[float, float, float]  # red, green, blue in [0, 1]

# Saturation and value of the first, second, ... instance of a class, repeated.
_SHADES = ((0.80, 1.00), (0.45, 1.00), (0.95, 0.72), (0.60, 0.85))
# Hues of the first classes, chosen to be told apart; further ones are spread by the golden ratio.
_HUES = (0.00, 0.58, 0.33, 0.09, 0.83, 0.50, 0.15, 0.73, 0.93, 0.42)
_GOLDEN_RATIO = 0.61803398875


def display_scale(height: int, width: int, target: int = 560) -> float:
    """Factor by which a small image is enlarged, so that text and outlines can be read on it.

    A whole number from 1 to 8, the one that brings the longer side closest to `target` pixels.
    """
    return float(min(max(round(target / max(height, width)), 1), 8))


def instance_colors(classes: Sequence[int], thing_colors: Sequence | None = None) -> list[Color]:
    """A hue for each class, the same in every picture, and a shade of it for each instance.

    Args:
        classes: class index of every instance.
        thing_colors: RGB in 0..255 of every class; default: a built-in choice.
    """
    seen = {}
    colors = []
    for index in classes:
        count = seen[index] = seen.get(index, -1) + 1
        saturation, value = _SHADES[count % len(_SHADES)]
        if thing_colors:
            hue, own, _ = colorsys.rgb_to_hsv(*(c / 255 for c in thing_colors[index]))
            saturation = min(saturation, own) if own < 0.2 else saturation
        else:
            hue = _HUES[index] if index < len(_HUES) else (index * _GOLDEN_RATIO) % 1.0
        colors.append(colorsys.hsv_to_rgb(hue, saturation, value))
    return colors


def class_labels(
    classes: Sequence[int], metadata, scores: Sequence[float] | None = None
) -> list[str]:
    """`name` or `name 97%` for every instance.

    Raises:
        UserError: the metadata has no name for a class.
    """
    names = list(metadata.get("thing_classes") or ()) if metadata is not None else []
    unnamed = [c for c in classes if not 0 <= c < len(names)]
    if unnamed:
        raise UserError(
            f"class {unnamed[0]} has no name: metadata.thing_classes has {len(names)} names"
        )
    if scores is None:
        return [names[c] for c in classes]
    return [f"{names[c]} {100 * score:.0f}%" for c, score in zip(classes, scores)]


def resized(rgb: np.ndarray, scale: float | None = None) -> np.ndarray:
    """A copy of an image, uint8 (scale * H, scale * W, 3), rounded; default: `display_scale`."""
    height, width = rgb.shape[:2]
    scale = display_scale(height, width) if scale is None else float(scale)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    canvas = np.ascontiguousarray(rgb, dtype=np.uint8)
    if size == (width, height):
        return canvas.copy() if canvas is rgb else canvas
    enlarging = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return cv2.resize(canvas, size, interpolation=enlarging)


def overlay(
    rgb: np.ndarray,
    boxes: np.ndarray,
    masks: Sequence[np.ndarray] | np.ndarray | None,
    labels: Sequence[str],
    colors: Sequence[Color],
    scale: float | None = None,
    alpha: float = 0.4,
) -> np.ndarray:
    """Draw instances over a copy of an image, large ones first.

    Args:
        rgb: uint8 (H, W, 3).
        boxes: (N, 4) x0, y0, x1, y1, continuous coordinates in pixels of the image.
        masks: N of bool (H, W), or None.
        labels, colors: N each.
        scale: enlargement; default: `display_scale`.
        alpha: opacity of the masks.

    Returns:
        uint8 (scale * H, scale * W, 3), rounded.
    """
    scale = display_scale(*rgb.shape[:2]) if scale is None else float(scale)
    canvas = resized(rgb, scale)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    order = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable").tolist()
    if masks is not None:
        for i in order:
            _blend_mask(canvas, masks[i], colors[i], alpha)
    for i in order:
        _draw_box(canvas, boxes[i], colors[i])
    _draw_labels(canvas, boxes, labels, colors, order)
    return canvas


def _blend_mask(canvas: np.ndarray, mask: np.ndarray, color: Color, alpha: float) -> None:
    """Fill and outline one mask, enlarged to the canvas, in place."""
    height, width = canvas.shape[:2]
    if mask.shape != (height, width):
        soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        mask = soft > 0.5
    mask = cast(Any, np.ascontiguousarray(mask).view(np.uint8))
    left, top, columns, rows = cv2.boundingRect(mask)
    if not rows:
        return
    # A photograph is large, its objects are not.
    window = slice(top, top + rows), slice(left, left + columns)
    mask = mask[window]
    tint = 255.0 * np.asarray(color)
    tinted = ((1 - alpha) * np.arange(256)[:, None, None] + alpha * tint).astype(np.uint8)
    pixels = canvas[window]
    pixels[...] = cv2.copyTo(cv2.LUT(pixels, tinted), mask, pixels.copy())
    contours = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[-2]
    thickness = max(1, round((height * width) ** 0.5 / 300))
    cv2.drawContours(
        canvas, contours, -1, tint.tolist(), thickness, cv2.LINE_AA, offset=(left, top)
    )


def _draw_box(canvas: np.ndarray, box: np.ndarray, color: Color, alpha: float = 0.75) -> None:
    """The frame of a box, in place; its line lies on the border, half inside and half outside."""
    height, width = canvas.shape[:2]
    line = max(2, round((height * width) ** 0.5 / 260))
    x0, y0, x1, y1 = (round(float(v) - line / 2) for v in box)
    tint = alpha * 255.0 * np.asarray(color)
    rows, columns = slice(y0 + line, y1), slice(x0, x1 + line)
    for top, left in (
        (slice(y0, y0 + line), columns),
        (slice(max(y1, y0 + line), y1 + line), columns),
        (rows, slice(x0, x0 + line)),
        (rows, slice(max(x1, x0 + line), x1 + line)),
    ):
        window = canvas[_inside(top), _inside(left)]
        window[...] = ((1 - alpha) * window + tint).astype(np.uint8)


def _inside(part: slice) -> slice:
    """Without what lies before the beginning, which Python would count from the end."""
    return slice(max(part.start, 0), max(part.stop, 0))


def _draw_labels(canvas, boxes, labels, colors, order) -> None:
    height, width = canvas.shape[:2]
    pixels = max(14, round(0.0155 * (height * width) ** 0.5))
    sizes = [text_size(label, pixels) for label in labels]
    # The small boxes first: they have fewer places for their label.
    order = order[::-1]
    corners = place_labels(boxes[order], [sizes[i] for i in order], height, width)
    for i, corner in zip(order, corners):
        light = tuple(0.6 * c + 0.4 for c in colors[i])  # readable on the dark label
        draw_label(canvas, labels[i], corner, pixels, light)
