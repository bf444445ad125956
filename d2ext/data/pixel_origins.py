"""Where the pixels of an augmented label map come from, for the transforms of detectron2 that move
whole rows and columns: then a mask can be transformed inside its box alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from detectron2.data import transforms as T


class PixelOrigins(NamedTuple):
    """Pixel (i, j) of the result is pixel (rows[i], columns[j]) of the source: the image, or the
    image with its axes exchanged. A number below 0 is no pixel of the image."""

    rows: np.ndarray
    columns: np.ndarray
    exchanged: bool = False

    def everywhere(self) -> bool:
        """Whether all pixels of the result show a part of the image."""
        return bool((self.rows >= 0).all() and (self.columns >= 0).all())

    def move(self, crop: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """What becomes of a mask.

        Args:
            crop: uint8 (h, w), the mask inside a box.
            box: x0, y0, x1, y1 of that box in the image.

        Returns:
            uint8, a part of the result outside of which the mask is empty, and the x, y of its
            first pixel.
        """
        x0, y0, x1, y1 = box.tolist()
        if self.exchanged:
            crop, x0, y0, x1, y1 = crop.T, y0, x0, y1, x1
        rows = np.flatnonzero((self.rows >= y0) & (self.rows < y1))
        columns = np.flatnonzero((self.columns >= x0) & (self.columns < x1))
        if not len(rows) or not len(columns):
            return np.zeros((0, 0), np.uint8), (0, 0)
        moved = crop.take(self.columns[columns] - x0, 1).take(self.rows[rows] - y0, 0)
        return moved, (int(columns[0]), int(rows[0]))


def trace(transforms: T.TransformList, height: int, width: int) -> PixelOrigins | None:
    """Follow the pixels of an image through transforms, exactly as `apply_segmentation` moves them.

    Args:
        transforms: those of one image.
        height, width: of the image before them, in pixels.

    Returns:
        None when one of them may do something else than move rows and columns.
    """
    origins = PixelOrigins(np.arange(height), np.arange(width))
    for transform in transforms.transforms:
        step = _step_of(transform)
        moved = step(transform, origins) if step is not None else None
        if moved is None:
            return None
        origins = moved
    return origins


def _step_of(transform: T.Transform) -> Callable | None:
    """Also for subclasses, if they change nothing that moves pixels."""
    own = type(transform)
    for known, step in _STEPS.items():
        if isinstance(transform, known) and all(
            getattr(own, name) is getattr(known, name)
            for name in ("apply_image", "apply_segmentation")
        ):
            return step
    return None


def _stay(transform, origins):
    return origins


def _flip_columns(transform, origins):
    return origins._replace(columns=origins.columns[::-1])


def _flip_rows(transform, origins):
    return origins._replace(rows=origins.rows[::-1])


def _resize(transform, origins):
    if (transform.h, transform.w) != (len(origins.rows), len(origins.columns)):
        return None
    return origins._replace(
        rows=_nearest(origins.rows, transform.new_h),
        columns=_nearest(origins.columns, transform.new_w),
    )


def _nearest(indices, length):
    """Pillow itself chooses the pixels: its rounding adds up along the axis."""
    column = Image.fromarray(indices.astype(np.int32)[:, None])
    return np.asarray(column.resize((1, length), Image.NEAREST))[:, 0].astype(np.int64)


def _crop(transform, origins):
    x, y, width, height = transform.x0, transform.y0, transform.w, transform.h
    return origins._replace(
        rows=origins.rows[y : y + height], columns=origins.columns[x : x + width]
    )


def _pad(transform, origins):
    return origins._replace(
        rows=np.pad(origins.rows, (transform.y0, transform.y1), constant_values=-1),
        columns=np.pad(origins.columns, (transform.x0, transform.x1), constant_values=-1),
    )


def _rotate(transform, origins):
    turns, rest = divmod(transform.angle % 360, 90)
    if rest or (turns and not transform.expand):
        return None
    for _ in range(int(turns)):
        rows, columns, exchanged = origins
        origins = PixelOrigins(columns[::-1], rows, not exchanged)
    return origins


_STEPS: dict[type, Callable] = {
    T.NoOpTransform: _stay,
    T.ColorTransform: _stay,
    T.PILColorTransform: _stay,
    T.BlendTransform: _stay,
    T.HFlipTransform: _flip_columns,
    T.VFlipTransform: _flip_rows,
    T.ResizeTransform: _resize,
    T.CropTransform: _crop,
    T.PadTransform: _pad,
    T.RotationTransform: _rotate,
}
