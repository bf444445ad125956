"""Repeated entries of a COCO file, and areas that are not those of the masks."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from d2ext.data.check.polygons import Shapes, drawn_area
from d2ext.data.check.problems import Finding

_COPIES = 0.25  # share of annotations
_BOX_AREAS = 0.5
_DRAWN = 1000
_LARGEST = 1e10  # pixels: pycocotools evaluates no larger object


def file_repeats(images: Sequence[dict]) -> Iterator[tuple[dict, Finding]]:
    """Images whose file belongs to an earlier image as well; all have a file name."""
    first: dict[str, dict] = {}
    for image in images:
        other = first.setdefault(os.path.normpath(image["file_name"]), image)
        if other is not image:
            text = f"is listed twice, with the ids {other['id']} and {image['id']}; objects of "
            text += "the one are background in the other: merge them"
            yield image, Finding("error", "file-twice", text)


def copies(annotations: Sequence[dict]) -> Iterator[tuple[int | None, Finding]]:
    """Annotations that repeat image, category, box and mask of an earlier one.

    Yields:
        (index, warning); at last (None, error) if there are many.
    """
    first: dict[tuple, dict] = {}
    count = 0
    for index, annotation in enumerate(annotations):
        key = (annotation["image_id"], annotation["category_id"], *annotation["bbox"])
        other = first.setdefault(key, annotation)
        if other is not annotation and other["segmentation"] == annotation["segmentation"]:
            count += 1
            yield index, Finding("warning", "copy", f"is a copy of annotation {other['id']}")
    if count > 1 and count >= _COPIES * len(annotations):
        text = f"{count} of {len(annotations)} annotations are copies of others; was a file merged "
        yield None, Finding("error", "copies", text + "with itself?")


def area_findings(
    annotations: Sequence[dict], shapes: Shapes, sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[int | None, Finding]]:
    """Areas that evaluation would trip over, with the index of the annotation; a warning about all
    those that differ from the masks."""
    stated = np.array([float(a.get("area", np.nan)) for a in annotations])
    with np.errstate(invalid="ignore"):
        for index in np.flatnonzero((stated < 0) | (stated > _LARGEST)).tolist():
            text = f"has area {annotations[index]['area']}; evaluation leaves the object out"
            yield index, Finding("evaluation", "area-range", text)
        larger, difference = np.maximum(stated, shapes.areas), abs(stated - shapes.areas)
        odd = np.flatnonzero((stated >= 0) & (difference > 0.5 * larger) & (difference > 16))
        boxes = np.array([a["bbox"][2] * a["bbox"][3] for a in annotations], float)
        of_box = (abs(stated - boxes) <= 0.01 * boxes) & (shapes.areas < 0.9 * boxes)
        known = np.isfinite(stated) & np.isfinite(shapes.areas)
    end = "APs, APm and APl go by it"
    if of_box.sum() > 1 and of_box.sum() >= _BOX_AREAS * known.sum():
        text = f"the area of {of_box.sum()} of {known.sum()} annotations is that of their boxes, "
        yield None, Finding("warning", "areas", f"{text}not of their masks; {end}")
        return
    odd = [
        i for n, i in enumerate(odd.tolist()) if n >= _DRAWN or _is_odd(annotations[i], sizes[i])
    ]
    if odd:
        example = annotations[odd[0]]
        text = f"the area of {len(odd)} of {known.sum()} annotations is not that of their masks "
        text += f"(e.g. annotation {example['id']}: {example['area']}, mask "
        text += f"{shapes.areas[odd[0]]:.0f}); {end}"
        yield None, Finding("warning", "areas", text)


def _is_odd(annotation, size) -> bool:
    """Whether the area is not that of the mask as drawn: that of a polygon which crosses itself is
    not the sum over its corners."""
    mask = annotation["segmentation"]
    if isinstance(mask, dict):
        return True
    drawn = drawn_area(mask, size)
    return abs(annotation["area"] - drawn) > 0.5 * max(annotation["area"], drawn)
