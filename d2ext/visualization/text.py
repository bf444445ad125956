"""Measuring, placing and drawing of text in matplotlib's own sans-serif font, with labels that get
out of each other's way."""

import functools
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the picture


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, `size` pixels high."""
    folder = matplotlib.get_data_path()
    return ImageFont.truetype(f"{folder}/fonts/ttf/DejaVuSans.ttf", size)


def text_size(text: str, size: int) -> tuple[float, float]:
    """Width and height in pixels of a line of text with a little room around it."""
    return font(size).getlength(text) + 0.3 * size, 1.25 * size


def draw_label(
    canvas: np.ndarray,
    text: str,
    corner: tuple[float, float],
    size: int,
    color: tuple[float, float, float],
) -> None:
    """Write a line of text on a dark ground, in place; outside of the picture there is nothing.

    Args:
        canvas: uint8 (H, W, 3), RGB.
        corner: x, y of the top left pixel.
        size: height of the font in pixels, see `text_size` for the room that is taken.
        color: red, green, blue in [0, 1].
    """
    width, height = (round(v) for v in text_size(text, size))
    left, top = (max(round(v), 0) for v in corner)
    window = canvas[top : top + height, left : left + width]
    if not window.size:
        return
    label = Image.fromarray((0.2 * window).astype(np.uint8))
    fill = tuple(round(255 * c) for c in color)
    ImageDraw.Draw(label).text((0.15 * size, 0), text, fill=fill, font=font(size))
    window[...] = np.asarray(label)


def place_labels(
    boxes: np.ndarray, sizes: Sequence[tuple[float, float]], height: int, width: int
) -> list[tuple[float, float]]:
    """Top left corners of labels near their boxes, with little overlap among the labels.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in pixels.
        sizes: width and height of each label in pixels.
        height, width: of the picture; labels stay inside where they fit at all.
    """
    taken: list[Rect] = []
    corners = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes.tolist(), sizes):
        best, best_cost = (0.0, 0.0, 0.0, 0.0), float("inf")
        middle = (y0 + y1 - h) / 2
        # In order of preference: outside above and below, then inside, then beside the box.
        wishes = [(x0, y0 - h), (x1 - w, y0 - h), (x0, y1), (x1 - w, y1), (x0, y0), (x0, y1 - h)]
        wishes += [(x1, middle), (x0 - w, middle), ((x0 + x1 - w) / 2, middle)]
        for rank, (x, y) in enumerate(wishes):
            inside = min(max(x, 0), max(width - w, 0)), min(max(y, 0), max(height - h, 0))
            rect = (*inside, inside[0] + w, inside[1] + h)
            moved = abs(inside[0] - x) / w + abs(inside[1] - y) / h
            cost = sum(_overlap(rect, other) for other in taken) / (w * h)
            cost = 4 * cost + 0.5 * moved + 0.05 * rank
            if cost < best_cost:
                best, best_cost = rect, cost
        taken.append(best)
        corners.append(best[:2])
    return corners


def _overlap(a: Rect, b: Rect) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0
