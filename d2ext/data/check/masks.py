"""What may be wrong with the `segmentation` of an annotation: polygons, run-length encodings and
bitmaps. Used for whole files before a training, and for each record when it is loaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from d2ext.data.check.polygons import EMPTY, Shapes, form_finding, no_shapes, polygon_findings
from d2ext.data.check.problems import Finding
from d2ext.data.check.rle import compressed_run_sums, list_run_sums

_NO_MASK = Finding("error", "no-mask", "has no segmentation; instance masks are needed")


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
    return None if area else EMPTY


def check_masks(
    segmentations: Sequence[Any], sizes: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, Finding]], Shapes]:
    """Check masks.

    Args:
        segmentations: `segmentation` entries: polygons, RLE (compressed or not) or 2D array.
        sizes: (height, width) of the image of each.

    Returns:
        (index, finding), at most one each, in their order; the shapes of the masks that can be
        used, except arrays.
    """
    findings: list[tuple[int, Finding]] = []
    encoded: list[int] = []
    polygons: list[int] = []
    for index, (segmentation, size) in enumerate(zip(segmentations, sizes)):
        finding = None
        if isinstance(segmentation, np.ndarray):
            if segmentation.shape != tuple(size):
                text = f"has a mask of shape {segmentation.shape}, image {list(size)}"
                finding = Finding("error", "mask-size", text)
        elif not segmentation:
            finding = _NO_MASK
        elif isinstance(segmentation, list):
            finding = form_finding(segmentation)
            if finding is None:
                polygons.append(index)
        elif isinstance(segmentation, dict):
            finding = _rle_fault(segmentation, size)
            if finding is None:
                encoded.append(index)
        else:
            text = f"has a segmentation of type {type(segmentation).__name__}"
            finding = Finding("error", "mask-form", text)
        if finding:
            findings.append((index, finding))
    shapes = no_shapes(len(segmentations))
    for indices, check in ((polygons, polygon_findings), (encoded, _encoded_findings)):
        if indices:
            found, known = check([segmentations[i] for i in indices], [sizes[i] for i in indices])
            findings += [(indices[i], finding) for i, finding in found]
            for whole, values in zip(shapes, known):
                whole[indices] = values
    return sorted(findings, key=lambda pair: pair[0]), shapes


def _encoded_findings(rles, sizes):
    """As `polygon_findings`, for run-length encodings whose form was found right."""
    sums: list[tuple] = [()] * len(rles)
    strings = []
    for i, rle in enumerate(rles):
        if isinstance(rle["counts"], list):
            sums[i] = list_run_sums(rle["counts"])
        else:
            strings.append(i)
    texts = [rles[i]["counts"] for i in strings]
    texts = [t.encode("ascii") if isinstance(t, str) else t for t in texts]
    for i, both in zip(strings, zip(*(x.tolist() for x in compressed_run_sums(texts)))):
        sums[i] = both
    findings, sound = [], []
    for i, (both, size) in enumerate(zip(sums, sizes)):
        finding = _runs_finding(*both, size)
        if finding:
            findings.append((i, finding))
        else:
            sound.append(i)
    shapes = no_shapes(len(rles))
    if sound:
        shapes.extents[sound] = encoded_extents([rles[i] for i in sound])
        shapes.areas[sound] = [sums[i][1] for i in sound]
    return findings, shapes


def encoded_extents(rles: Sequence[dict]) -> np.ndarray:
    """float (N, 4): x0, y0, x1, y1 of each of some valid run-length encodings."""
    rles = [
        mask_util.frPyObjects(r, *r["size"]) if isinstance(r["counts"], list) else r for r in rles
    ]
    boxes = mask_util.toBbox(rles).reshape(-1, 4) if rles else np.zeros((0, 4))
    boxes[:, 2:] += boxes[:, :2]
    return boxes
