"""What every reader of annotations returns, and its form as a COCO instances file.

All coordinates are pixels of the picture as viewers show it, its EXIF orientation applied, because
detectron2 reads it so; x = 0 is the left edge of the first pixel, x = width the right edge of the
last one.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from d2ext.data.check.images import DECODE_ERRORS, image_finding, read_header
from d2ext.errors import UserError

SEGMENTATIONS = ("polygon", "rle")


@dataclasses.dataclass
class Shape:
    """One object: everything that its polygons and masks cover.

    Attributes:
        name: of the class.
        place: where it is written, such as "a.json line 7"; starts messages about it.
        polygons: `[x0, y0, x1, y1, ...]` each.
        masks: run-length encodings of pycocotools.
        crowd: whether it is COCO's region of many objects.
    """

    name: str
    place: str
    polygons: list[list[float]] = dataclasses.field(default_factory=list)
    masks: list[dict] = dataclasses.field(default_factory=list)
    crowd: bool = False


@dataclasses.dataclass
class Picture:
    """An image file, (width, height) of the picture shown, and its objects."""

    path: str
    size: tuple[int, int]
    shapes: list[Shape] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Annotations:
    """What a reader found.

    Attributes:
        pictures: in any order.
        classes: their names in the order of the source; None if it has none.
        notes: one line each on what the user should know.
    """

    pictures: list[Picture]
    classes: list[str] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def shown_size(
    path: str, place: str = "", stated: tuple[Any, Any] | None = None
) -> tuple[int, int]:
    """(width, height) of the picture in a file, as shown.

    Args:
        place: where the image is named, if an error should say so.
        stated: the size in the annotations.

    Raises:
        UserError: the file is missing, damaged or of a kind that cannot be trained on, or of
            another size than stated.
    """
    try:
        size = read_header(path).size
    except DECODE_ERRORS:
        size = (0, 0)  # what is wrong follows
    finding = image_finding(path, *(size if stated is None else stated))
    if finding and finding.severity == "error":
        start = f"{place}: " if place else ""
        raise UserError(f"{start}image {path} {finding.text}")
    return size


def image_files(folder: str) -> list[str]:
    """All files in a folder and those below it whose names end like those of images, in order."""
    known = Image.registered_extensions()
    endings = tuple(ending for ending, kind in known.items() if kind in Image.OPEN)
    files = sorted(p for p in Path(folder).rglob("*") if p.name.lower().endswith(endings))
    return [str(p) for p in files if not p.name.startswith(".")]


def polygon_of(points: Any, place: str, size: tuple[int, int]) -> list[float]:
    """A checked polygon of an image.

    Args:
        points: flat, x and y by turns.

    Raises:
        UserError: fewer than 3 points, no finite numbers, or far outside of the picture.
    """
    if not isinstance(points, list) or len(points) % 2 or len(points) < 6:
        raise UserError(f"{place}: a polygon needs at least 3 points of x and y; draw it again")
    for value, side in zip(points, size * (len(points) // 2)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{place}: the coordinate {value!r} is no finite number")
        if not -side <= value <= 2 * side:
            raise UserError(
                f"{place}: the coordinate {value} lies far outside of the picture of "
                f"{size[0]}x{size[1]}; coordinates are pixels"
            )
    return [float(value) for value in points]


def mask_of(mask: np.ndarray) -> dict:
    """Run-length encoding of a mask (height, width); what is not zero belongs to the object."""
    return mask_util.encode(np.asfortranarray(mask != 0, np.uint8))


def _merged(shape: Shape, size: tuple[int, int]) -> dict:
    width, height = size
    drawn = mask_util.frPyObjects(shape.polygons, height, width) if shape.polygons else []
    return mask_util.merge(drawn + shape.masks)


def _annotation(shape: Shape, size: tuple[int, int], segmentation: str) -> dict | None:
    """All but the ids; None if the object covers no pixel."""
    rle = _merged(shape, size)
    area = int(mask_util.area(rle))
    if not area:
        return None
    if shape.masks or segmentation == "rle":
        box = mask_util.toBbox(rle).tolist()
        mask: Any = {"size": [size[1], size[0]], "counts": rle["counts"].decode()}
    else:
        corners = np.concatenate([np.reshape(p, (-1, 2)) for p in shape.polygons])
        low, high = corners.min(0).clip(0, size), corners.max(0).clip(0, size)
        box, mask = [*low.tolist(), *(high - low).tolist()], shape.polygons
    return {"bbox": box, "area": area, "iscrowd": int(shape.crowd), "segmentation": mask}


def _class_ids(annotations: Annotations, classes: Sequence[str] | None) -> dict[str, int]:
    places: dict[str, str] = {}
    for shape in (s for p in annotations.pictures for s in p.shapes):
        places.setdefault(shape.name, shape.place)
    names = list(classes or annotations.classes or sorted(places))
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"the class {twice!r} is listed twice; name each class once")
    unknown = [name for name in places if name not in names]
    if unknown:
        raise UserError(
            f"{places[unknown[0]]}: the class {unknown[0]!r} is not among {', '.join(names)}; "
            "correct it, or add it to the classes"
        )
    if not names:
        raise UserError("no object was found, so no class is known; name the classes: --classes")
    return {name: i for i, name in enumerate(names, start=1)}


def to_coco_file(
    annotations: Annotations,
    image_root: str,
    segmentation: str = "polygon",
    classes: Sequence[str] | None = None,
) -> dict:
    """A COCO instances file: images ordered by name, annotations as they were written, all ids from
    1, categories in the order of `classes`, of the source or of the alphabet.

    The area is that of the mask as pycocotools draws it. So is the box of a mask; that of polygons
    reaches from their first to their last coordinate within the picture.

    Args:
        image_root: `file_name` is relative to this folder.
        segmentation: "polygon" leaves polygons as they are (masks become run-length encodings);
            "rle" draws them, so that all formats give the same.
        classes: names instead of those of the source.

    Returns:
        the file; objects that cover no pixel are left out and added to the notes of `annotations`.

    Raises:
        UserError: no image, a class that is not listed, or an image listed twice.
    """
    ids = _class_ids(annotations, classes)
    images, entries, names = [], [], {}
    for picture in annotations.pictures:
        name = os.path.relpath(picture.path, image_root).replace(os.sep, "/")
        if name in names:
            raise UserError(f"image {picture.path} is annotated twice; remove one of the two")
        names[name] = picture
    if not names:
        raise UserError("no annotated image was found")
    for name, picture in sorted(names.items()):
        width, height = picture.size
        image = {"id": len(images) + 1, "file_name": name, "width": width, "height": height}
        images.append(image)
        for shape in picture.shapes:
            entry = _annotation(shape, picture.size, segmentation)
            if entry is None:
                annotations.notes.append(f"{shape.place}: covers no pixel and is left out")
                continue
            own = {"id": len(entries) + 1, "image_id": image["id"], "category_id": ids[shape.name]}
            entries.append({**own, **entry})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": entries, "categories": categories}
