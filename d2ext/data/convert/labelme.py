"""Annotations of labelme: a JSON file per image.

labelme shows pictures turned by their EXIF orientation, so that its coordinates are those of the
picture shown. Shapes of one label and one group id are one object of several parts.
"""

import base64
import binascii
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2ext.data.check.images import DECODE_ERRORS
from d2ext.data.convert.objects import (
    Annotations,
    Picture,
    Shape,
    mask_of,
    polygon_of,
    shown_size,
)
from d2ext.data.json_files import Places, read_json
from d2ext.errors import UserError

_CIRCLE = 72  # corners


def _numbers(points: Any, count: int | None, place: str) -> list[float]:
    """Flat coordinates of [[x, y], ...]."""
    pairs = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    if not pairs or (count is not None and len(points) != count):
        number = "" if count is None else f"{count} "
        raise UserError(f"{place}: its points are not {number}pairs of x and y; draw it again")
    return [value for point in points for value in point]


def _mask(shape: dict, place: str, size: tuple[int, int]) -> dict:
    """A mask that is stored as a PNG within the box of its two points, whose last pixels count."""
    x0, y0, x1, y1 = _numbers(shape.get("points"), 2, place)
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            part = np.asarray(image.convert("L"))
        x, y = round(x0), round(y0)
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error, *DECODE_ERRORS) as e:
        raise UserError(f"{place}: its mask cannot be read; draw it again") from e
    (height, width), whole = part.shape, np.zeros(size[::-1], np.uint8)
    fits = (x + width - 1, y + height - 1) == (round(x1), round(y1))
    if not fits or min(x, y) < 0 or x + width > size[0] or y + height > size[1]:
        raise UserError(f"{place}: its mask does not fit its points or the picture; draw it again")
    whole[y : y + height, x : x + width] = part
    return mask_of(whole)


def _add(target: Shape, shape: dict, size: tuple[int, int]) -> None:
    """Add the area of a shape to an object."""
    kind, points, place = shape.get("shape_type", "polygon"), shape.get("points"), target.place
    if kind == "mask":
        target.masks.append(_mask(shape, place, size))
        return
    if kind in ("polygon", "oriented_rectangle"):
        corners = _numbers(points, None, place)
    elif kind == "rectangle":
        if isinstance(points, list) and len(points) == 4:
            corners = _numbers(points, 4, place)
        else:
            x0, y0, x1, y1 = _numbers(points, 2, place)
            corners = [x0, y0, x1, y0, x1, y1, x0, y1]
    elif kind == "circle":
        values = _numbers(points, 2, place)
        x, y, *_ = polygon_of([*values, *values, *values], place, size)
        radius = math.dist(values[:2], values[2:])
        angles = [2 * math.pi * i / _CIRCLE for i in range(_CIRCLE)]
        corners = [v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]
    else:
        raise UserError(f"{place}: a shape of the type {kind!r} covers no area; draw a polygon")
    target.polygons.append(polygon_of(corners, place, size))


def _shapes(path: str, data: dict, size: tuple[int, int]) -> list[Shape]:
    objects: dict[Any, Shape] = {}
    places = Places(path, "shapes")
    for index, shape in enumerate(data["shapes"]):
        place = places[index]
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            raise UserError(f"{place}: a shape without label; name it in labelme")
        group = shape.get("group_id")
        key = (label, group) if type(group) is int else index
        _add(objects.setdefault(key, Shape(label, place)), shape, size)
    return list(objects.values())


def read_labelme(folder: str, image_root: str | None = None) -> Annotations:
    """All files of labelme in a folder and those below it.

    Args:
        image_root: where images are that do not lie where `imagePath` says, by file name.

    Raises:
        UserError: one line naming the file and line of the first mistake.
    """
    files = sorted(Path(folder).rglob("*.json"))
    found, others = Annotations([]), []
    for file in tqdm(files, "labelme", unit="", leave=False, disable=None):
        path = str(file)
        data = read_json(path)
        if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
            others.append(path)
            continue
        name = data.get("imagePath")
        if not isinstance(name, str) or not name:
            raise UserError(f"{path} has no 'imagePath'; save it with labelme again")
        name = name.replace("\\", "/")
        image = os.path.normpath(os.path.join(file.parent, name))
        if not os.path.isfile(image) and image_root:
            image = os.path.join(image_root, os.path.basename(name))
        if not os.path.isfile(image):
            raise UserError(
                f"{path}: image {image} does not exist; put it there, or name its folder: --images"
            )
        stated = (data.get("imageWidth"), data.get("imageHeight"))
        size = shown_size(image, path, None if stated == (None, None) else stated)
        found.pictures.append(Picture(image, size, _shapes(path, data, size)))
    if not found.pictures:
        raise UserError(f"{folder} has no JSON file of labelme (with a list 'shapes')")
    if others:
        found.notes.append(f"{len(others)} JSON files are not of labelme: {others[0]}")
    return found
