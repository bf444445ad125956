"""What may be wrong with the polygons of annotations: their form one by one, their numbers for
thousands of annotations at once, in numpy.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.data.check.problems import Finding

_CHUNK = 5000  # annotations at once
_HUGE = 1e300
# Drawing a polygon takes memory for each pixel of its outline, wherever that lies.
_FAR = 10  # sides of the image
_FARTHEST = 1_000_000  # pixels

EMPTY = Finding("warning", "mask-empty", "has a mask of zero area; it is left out")
_NO_PIXEL = Finding("warning", "mask-empty", "has a mask that covers no pixel")
_OUTSIDE = Finding("warning", "mask-outside", "has a mask outside the image; it is left out")
_NAN = Finding("error", "polygon-nan", "has a polygon with a coordinate NaN or infinity")
# pycocotools takes four numbers for a box, in evaluation; detectron2 drops such polygons.
_FEW = Finding(
    "evaluation",
    "polygon-points",
    "has a polygon of fewer than 3 points; training leaves it out, evaluation cannot",
)


class Shapes(NamedTuple):
    """Of N annotations: extents (x0, y0, x1, y1) of their masks, (N, 4), NaN where there is none;
    areas in pixels, (N,); whether a part of the mask lies within 0..1, bool (N,)."""

    extents: np.ndarray
    areas: np.ndarray
    fractions: np.ndarray


def no_shapes(count: int) -> Shapes:
    """Shapes of annotations whose masks are not known yet."""
    nan = np.full(count, np.nan)
    return Shapes(np.full((count, 4), np.nan), nan, np.zeros(count, bool))


def form_finding(polygons: Sequence[Any]) -> Finding | None:
    """An error in the form of polygons, which have to be lists of numbers x0, y0, x1, y1, ..."""
    for polygon in polygons:
        if not isinstance(polygon, (list, np.ndarray)):
            text = "has a segmentation that is no list of lists [x0, y0, x1, ...]"
            return Finding("error", "polygon-form", text)
        if isinstance(polygon, np.ndarray):
            polygon = polygon.tolist()
        if not {int, float}.issuperset(map(type, polygon)):  # a bool is no number here
            text = "has a polygon with an entry that is no number"
            return Finding("error", "polygon-number", text)
        if len(polygon) % 2:
            text = f"has a polygon of {len(polygon)} numbers; they must be pairs"
            return Finding("error", "polygon-odd", text)
    return None


def polygon_findings(
    annotations: Sequence[Sequence], sizes: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, Finding]], Shapes]:
    """Check the coordinates of polygons whose form was found right.

    Args:
        annotations: the polygons of each annotation.
        sizes: (height, width) of the image of each.

    Returns:
        findings with the index of the annotation, at most one each; shapes.
    """
    findings = []
    shapes = no_shapes(len(annotations))
    for start in range(0, len(annotations), _CHUNK):
        part = slice(start, start + _CHUNK)
        found, known = _check_chunk(annotations[part], np.array(sizes[part], float))
        findings += [(start + index, finding) for index, finding in found]
        for whole, values in zip(shapes, known):
            whole[part] = values
    return findings, shapes


def _flat(polygons) -> np.ndarray:
    try:
        return np.fromiter(itertools.chain.from_iterable(polygons), float)
    except OverflowError:  # whole numbers that no float can hold
        numbers = itertools.chain.from_iterable(polygons)
        return np.array([max(-_HUGE, min(_HUGE, number)) for number in numbers], float)


def _measure(annotations) -> Shapes:
    """Shapes of annotations; of several polygons the areas are added."""
    polygons = [p for own in annotations for p in own if len(p)]
    counts = np.array([sum(1 for p in own if len(p)) for own in annotations])
    shapes = no_shapes(len(annotations))
    if not polygons:
        return shapes
    numbers = _flat(polygons)
    x, y = numbers[0::2], numbers[1::2]
    points = np.array([len(p) // 2 for p in polygons])
    starts = np.cumsum(points) - points
    following = np.arange(1, len(x) + 1)
    following[starts + points - 1] = starts
    lower = np.minimum.reduceat(x, starts), np.minimum.reduceat(y, starts)
    upper = np.maximum.reduceat(x, starts), np.maximum.reduceat(y, starts)
    with np.errstate(all="ignore"):
        areas = abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
        inside = (np.minimum(*lower) >= 0) & (np.maximum(*upper) <= 1)
    some = counts > 0
    first = (np.cumsum(counts) - counts)[some]
    parts = [np.minimum.reduceat(v, first) for v in lower]
    parts += [np.maximum.reduceat(v, first) for v in upper]
    shapes.extents[some] = np.stack(parts, 1)
    shapes.areas[some] = np.add.reduceat(areas, first)
    shapes.fractions[some] = np.logical_or.reduceat(inside, first)
    return shapes


def _check_chunk(annotations, sizes):
    shapes = _measure(annotations)
    height, width = sizes.T
    x0, y0, x1, y1 = shapes.extents.T
    few = np.array([any(len(p) < 6 for p in own) for own in annotations])
    known = np.array([any(len(p) for p in own) for own in annotations])
    limit = np.minimum(_FAR * sizes.max(1), _FARTHEST)
    broken = known & ~np.isfinite(shapes.extents).all(1)
    with np.errstate(all="ignore"):
        far = known & ~broken & (abs(shapes.extents).max(1) > limit)
        flat = (x1 <= x0) | (y1 <= y0)
        outside = (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0)
        # Less than a pixel wide, or crossing itself: only drawing it tells.
        thin = known & (shapes.areas < np.maximum(x1 - x0, y1 - y0))
    findings = []
    for index in np.flatnonzero(broken | far | few | flat | outside | thin).tolist():
        finding = None
        if broken[index]:
            finding = _NAN
        elif far[index]:
            value = max(shapes.extents[index].tolist(), key=abs)
            text = f"has a polygon with the coordinate {value:.4g}, far outside the image"
            finding = Finding("error", "polygon-far", text)
        elif few[index]:
            finding = _FEW
        elif flat[index]:
            finding = EMPTY
        elif outside[index]:
            finding = _OUTSIDE
        elif not drawn_area(annotations[index], sizes[index]):
            finding = _NO_PIXEL
        if finding:
            findings.append((index, finding))
            shapes.areas[index] = np.nan
        # The other two may show a mistake of the whole file: fractions, x and y swapped.
        if finding not in (None, _NO_PIXEL, _OUTSIDE):
            shapes.extents[index] = np.nan
    return findings, shapes


def drawn_area(polygons: Sequence, size: Sequence[int]) -> int:
    """Pixels that polygons of one annotation cover in an image of (height, width)."""
    lists = [p.tolist() if isinstance(p, np.ndarray) else p for p in polygons]
    rles = mask_util.frPyObjects(lists, int(size[0]), int(size[1]))
    return int(mask_util.area(mask_util.merge(rles)))
