"""What may be wrong with the `segmentation` of an annotation: polygons, run-length encodings and
bitmaps. Used for whole files before a training, and for each record when it is loaded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.data.check.rle import compressed_run_sums, list_run_sums

Box = tuple[float, float, float, float]


class Finding(NamedTuple):
    """A problem whose image and annotation the caller knows; see `problems.Problem`."""

    severity: str
    kind: str
    text: str


_NO_MASK = Finding("error", "no-mask", "has no segmentation; instance masks are needed")
_EMPTY = Finding("warning", "mask-empty", "has a mask of zero area; it is left out")


def _polygon_fault(polygon: Any) -> Finding | None:
    """An error of one polygon, which has to be a list of numbers x0, y0, x1, y1, ..."""
    if not isinstance(polygon, list):
        return Finding(
            "error", "polygon-form", "has a segmentation that is no list of lists [x0, y0, x1, ...]"
        )
    try:
        total = sum(polygon)
    except TypeError:
        return Finding("error", "polygon-number", "has a polygon with an entry that is no number")
    if total - total != 0:
        return Finding("error", "polygon-nan", "has a polygon with a coordinate NaN or infinity")
    if len(polygon) % 2:
        return Finding(
            "error", "polygon-odd", f"has a polygon of {len(polygon)} numbers; they must be pairs"
        )
    return None


def _check_polygons(polygons: Sequence, size: tuple[int, int]) -> tuple[Finding | None, Box | None]:
    """A finding, and the extent (x0, y0, x1, y1) of the polygons that can be used."""
    few = False
    usable = []
    for polygon in polygons:
        polygon = polygon.tolist() if isinstance(polygon, np.ndarray) else polygon
        fault = _polygon_fault(polygon)
        if fault:
            return fault, None
        if len(polygon) < 6:
            few = True
        else:
            usable.append(polygon)
    if few:
        # pycocotools takes four numbers for a box, in evaluation; detectron2 drops such polygons.
        text = "has a polygon of fewer than 3 points; training leaves it out, evaluation cannot"
        return Finding("evaluation", "polygon-points", text), None
    extent = (
        min(min(p[0::2]) for p in usable),
        min(min(p[1::2]) for p in usable),
        max(max(p[0::2]) for p in usable),
        max(max(p[1::2]) for p in usable),
    )
    height, width = size
    if extent[2] <= extent[0] or extent[3] <= extent[1]:
        return _EMPTY, None
    if extent[0] >= width or extent[1] >= height or extent[2] <= 0 or extent[3] <= 0:
        return Finding(
            "warning", "mask-outside", "has a mask outside the image; it is left out"
        ), None
    return None, extent


def _rle_fault(rle: dict, size: tuple[int, int]) -> Finding | None:
    """An error in the form of a run-length encoding; its runs are checked elsewhere."""
    own, counts = rle.get("size"), rle.get("counts")
    if not isinstance(own, (list, tuple)) or not isinstance(counts, (list, str, bytes)):
        return Finding(
            "error", "rle-form", "has an RLE mask without the entries 'size' and 'counts'"
        )
    if list(own) != list(size):
        text = f"has a mask of (height, width) {list(own)}, image {list(size)}"
        return Finding("error", "rle-size", text)
    if isinstance(counts, str) and not counts.isascii():
        return Finding("error", "rle-runs", "has an RLE mask that cannot be decoded")
    return None


def _runs_finding(total: int, area: int, size: tuple[int, int]) -> Finding | None:
    if total < 0:
        return Finding("error", "rle-runs", "has an RLE mask that cannot be decoded")
    if total != size[0] * size[1]:
        text = f"has an RLE mask of {total} pixels, image {size[0] * size[1]}"
        return Finding("error", "rle-runs", text)
    return None if area else _EMPTY


def _box_finding(box: Box, extent: Box) -> Finding | None:
    """Whether a box [x, y, w, h] and the extent of its mask overlap by less than half (IoU)."""
    x0, y0, x1, y1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    shared = max(0, min(x1, extent[2]) - max(x0, extent[0]))
    shared *= max(0, min(y1, extent[3]) - max(y0, extent[1]))
    union = (x1 - x0) * (y1 - y0)
    union += (extent[2] - extent[0]) * (extent[3] - extent[1]) - shared
    # A pixel of rounding is much of a small object.
    if shared >= 0.5 * union or max(abs(a - b) for a, b in zip((x0, y0, x1, y1), extent)) <= 2:
        return None
    shown = [round(float(v), 1) for v in (*extent[:2], *np.subtract(extent[2:], extent[:2]))]
    return Finding(
        "warning", "box-mask", f"has the bbox {list(box)}, but a mask in {shown} (x, y, w, h)"
    )


def mask_findings(
    segmentations: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    boxes: Sequence[Box | None] | None = None,
) -> Iterator[tuple[int, Finding]]:
    """Check masks; at most one finding each.

    Args:
        segmentations: `segmentation` entries: polygons, RLE (compressed or not) or 2D array.
        sizes: (height, width) of the image of each.
        boxes: [x, y, width, height] of each; where given, they are compared with the masks.

    Yields:
        (index, finding).
    """
    encoded: list[int] = []
    for index, (segmentation, size) in enumerate(zip(segmentations, sizes)):
        finding = extent = None
        if isinstance(segmentation, np.ndarray):
            if segmentation.shape != tuple(size):
                text = f"has a mask of shape {segmentation.shape}, image {list(size)}"
                finding = Finding("error", "mask-size", text)
        elif not segmentation:
            finding = _NO_MASK
        elif isinstance(segmentation, list):
            finding, extent = _check_polygons(segmentation, size)
        elif isinstance(segmentation, dict):
            finding = _rle_fault(segmentation, size)
            if finding is None:
                encoded.append(index)
        else:
            text = f"has a segmentation of type {type(segmentation).__name__}"
            finding = Finding("error", "mask-form", text)
        if extent and boxes is not None and boxes[index]:
            finding = _box_finding(boxes[index], extent)
        if finding:
            yield index, finding
    yield from _encoded_findings(encoded, segmentations, sizes, boxes)


def _encoded_findings(indices, segmentations, sizes, boxes):
    lists = [i for i in indices if isinstance(segmentations[i]["counts"], list)]
    sums = {i: list_run_sums(segmentations[i]["counts"]) for i in lists}
    strings = [i for i in indices if i not in sums]
    texts = [segmentations[i]["counts"] for i in strings]
    texts = [t.encode("ascii") if isinstance(t, str) else t for t in texts]
    sums.update(zip(strings, zip(*(x.tolist() for x in compressed_run_sums(texts)))))
    compared = []
    for i in indices:
        finding = _runs_finding(*sums[i], sizes[i])
        if finding:
            yield i, finding
        elif boxes is not None and boxes[i]:
            compared.append(i)
    for i, extent in zip(compared, _encoded_extents([segmentations[i] for i in compared])):
        finding = _box_finding(boxes[i], extent)
        if finding:
            yield i, finding


def _encoded_extents(rles):
    """(x0, y0, x1, y1) of each of some valid run-length encodings."""
    rles = [
        mask_util.frPyObjects(r, *r["size"]) if isinstance(r["counts"], list) else r for r in rles
    ]
    boxes = mask_util.toBbox(rles).reshape(-1, 4) if rles else np.zeros((0, 4))
    boxes[:, 2:] += boxes[:, :2]
    return boxes.tolist()
