"""Boxes compared with the masks of their annotations, one by one and as a set: most systematic
mistakes of annotations show as boxes and masks in different places.

The likely cause is found by trying: what is read in another way fits, if that was the mistake.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from d2ext.data.check.masks import encoded_extents
from d2ext.data.check.polygons import Shapes
from d2ext.data.check.problems import Finding

_SHARE = 0.05  # of the annotations that a cause has to explain, and at least
_COUNT = 2
_FIT = 0.75  # IoU
_UNEXPLAINED = 0.5, 10  # share and number of annotations that are an error without a cause

_RIGHT = "[x, y, width, height]"


def _corners(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _centred(boxes):
    return _corners(np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1))


_FORMS = {
    _RIGHT: _corners,
    "[x0, y0, x1, y1]": lambda boxes: boxes,
    "[center x, center y, width, height]": _centred,
    "[y, x, height, width]": lambda boxes: _corners(boxes)[:, [1, 0, 3, 2]],
    "[y0, x0, y1, x1]": lambda boxes: boxes[:, [1, 0, 3, 2]],
}


def _iou(a, b):
    with np.errstate(all="ignore"):
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        shared = np.maximum(sides, 0).prod(1)
        union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
        return np.where(union > 0, shared / union, 0)


def _inside(corners, sizes):
    """Whether boxes lie in their images, up to a pixel; sizes are (height, width)."""
    return (corners[:, :2] >= -1).all(1) & (corners[:, 2:] <= sizes[:, ::-1] + 1).all(1)


def disagreements(boxes: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """Indices of annotations whose box overlaps the extent of its mask by less than half (IoU).

    Args:
        boxes: (N, 4) of x, y, width, height; NaN where there is none.
        extents: (N, 4) of x0, y0, x1, y1; NaN where there is none.
    """
    corners = _corners(boxes)
    known = np.isfinite(corners).all(1) & np.isfinite(extents).all(1)
    # A pixel of rounding is much of a small object.
    far = abs(np.nan_to_num(corners - extents)).max(1, initial=0) > 2
    return np.flatnonzero(known & far & (_iou(corners, extents) < 0.5))


def disagreement_finding(box: Sequence[float], extent: np.ndarray) -> Finding:
    """The warning about one of them."""
    shown = [round(float(v), 1) for v in (*extent[:2], *np.subtract(extent[2:], extent[:2]))]
    return Finding(
        "warning", "box-mask", f"has the bbox {list(box)}, but a mask in {shown} (x, y, w, h)"
    )


def _explanations(
    boxes: np.ndarray, extents: np.ndarray, sizes: np.ndarray, masks: Sequence[Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """What may have gone wrong, and with which of these disagreeing annotations it fits."""
    scale = sizes[:, [1, 0, 1, 0]]
    for form, corners_of in _FORMS.items():
        own = scale[:, ::-1] if form.startswith("[y") else scale
        for factor, unit in ((1, ""), (own, " in fractions of the image")):
            if form == _RIGHT and not unit:
                continue
            corners = corners_of(boxes * factor)
            fits = (_iou(corners, extents) >= _FIT) & _inside(corners, sizes)
            yield f"boxes fit their masks if read as {form}{unit}; they must be {_RIGHT}", fits
    corners = _corners(boxes)
    encoded = np.array([isinstance(mask, dict) for mask in masks], bool)
    swapped = extents[:, [1, 0, 3, 2]]
    fits = ~encoded & (_iou(corners, swapped) >= _FIT) & _inside(swapped, sizes)
    yield (
        "polygons fit their boxes if x and y are swapped; they must be [x0, y0, x1, y1, ...]",
        fits,
    )
    for axis in (0, 1):
        factor = np.where([[axis == i % 2 for i in range(4)]], scale, 1)
        fits = ~encoded & (_iou(corners, extents * factor) >= _FIT)
        text = f"polygons fit their boxes if {'xy'[axis]} is read in fractions of the image"
        yield f"{text}; both x and y must be pixels", fits
    fits = np.zeros(len(boxes), bool)
    by_rows = [{**m, "size": list(m["size"])[::-1]} for m in masks if isinstance(m, dict)]
    fits[encoded] = _iou(corners[encoded], encoded_extents(by_rows)[:, [1, 0, 3, 2]]) >= _FIT
    yield "RLE masks fit their boxes if read row by row; they must run column by column", fits


def _many(count: int, total: int) -> bool:
    return count >= max(_COUNT, _SHARE * total)


def systematic_findings(
    boxes: np.ndarray,
    shapes: Shapes,
    sizes: np.ndarray,
    masks: Sequence[Any],
    ids: Sequence[Any],
) -> Iterator[Finding]:
    """Errors of a whole file, judged on the share of annotations that show them.

    Args:
        boxes: (N, 4) of x, y, width, height; NaN where there is none.
        shapes: of the N masks.
        sizes: (N, 2), height and width of the images.
        masks: `segmentation` entries.
        ids: of the annotations.
    """
    extents = shapes.extents
    known = np.isfinite(boxes).all(1)
    compared = int((known & np.isfinite(extents).all(1)).sum())
    odd = disagreements(boxes, extents)
    yield from _fraction_findings(boxes, shapes.fractions, ids)
    if _many(len(odd), compared):
        tried = list(_explanations(boxes[odd], extents[odd], sizes[odd], [masks[i] for i in odd]))
        best = max(int(fits.sum()) for _, fits in tried)
        if _many(best, compared):
            # Some cannot be told apart: in square images a transposed mask is a transposed box.
            causes = [(text, fits) for text, fits in tried if fits.sum() >= 0.95 * best]
            example = ids[odd[np.flatnonzero(causes[0][1])[0]]]
            text = ", or ".join(text for text, _ in causes)
            text = f"{best} of {compared} {text} (e.g. annotation {example})"
            yield Finding("error", "systematic", text)
        elif len(odd) >= max(_UNEXPLAINED[0] * compared, _UNEXPLAINED[1]):
            text = f"boxes and masks of {len(odd)} of {compared} annotations lie in different "
            text += f"places (e.g. annotation {ids[odd[0]]}); were ids or files mixed up?"
            yield Finding("error", "systematic", text)
    yield from _swapped_findings(boxes, extents, sizes, ids)


def _fraction_findings(boxes, fractions, ids):
    known = np.isfinite(boxes).all(1)
    small = known & (np.nan_to_num(boxes).max(1, initial=0) <= 1)
    if known.any() and small.sum() == known.sum():
        text = "all boxes lie within 0..1: coordinates must be pixels, not fractions"
        yield Finding("error", "fractions", text)
    elif _many(small.sum(), known.sum()):
        text = f"{small.sum()} of {known.sum()} boxes lie within 0..1 (e.g. annotation "
        text += f"{ids[np.flatnonzero(small)[0]]}): coordinates must be pixels, not fractions"
        yield Finding("error", "fractions", text)
    large = known & (np.nan_to_num(boxes)[:, 2:].max(1, initial=0) > 2)
    odd = fractions & large
    if _many(odd.sum(), known.sum()):
        text = f"{odd.sum()} of {known.sum()} annotations have a polygon within 0..1 (e.g. "
        text += f"annotation {ids[np.flatnonzero(odd)[0]]}): coordinates must be pixels, not "
        yield Finding("error", "fractions", text + "fractions")


def _swapped_findings(boxes, extents, sizes, ids):
    """Boxes and masks that agree, but reach out of the image where they would not if swapped."""
    corners = _corners(boxes)
    known = np.isfinite(corners).all(1)
    masks = np.where(np.isfinite(extents), extents, corners)
    beyond = known & ~_inside(corners, sizes) & ~_inside(masks, sizes)
    fits = known & _inside(corners[:, [1, 0, 3, 2]], sizes)
    swapped = beyond & fits
    # Objects annotated beyond the border would fit too, but not those in the rest of the image.
    if _many(swapped.sum(), known.sum()) and fits.sum() >= 0.95 * known.sum():
        text = f"{swapped.sum()} of {known.sum()} annotations reach out of their images, but would "
        text += f"not with x and y swapped (e.g. annotation {ids[np.flatnonzero(swapped)[0]]}); "
        text += "swap x and y, or width and height of the images"
        yield Finding("error", "systematic", text)
