"""Annotations for YOLO's segmentation: a `data.yaml`, and a text file per image whose lines are a
class number and the corners of a polygon in fractions of the picture as shown.

Fractions are written with few digits, so that coordinates are rounded to hundredths of a pixel.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from d2ext.data.convert.objects import (
    Annotations,
    Picture,
    Shape,
    image_files,
    polygon_of,
    shown_size,
)
from d2ext.errors import UserError

_SLACK = 1e-3  # fractions may lie so far outside of 0..1


def _read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8-sig") as f:
            data = yaml.safe_load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML; correct it") from e
    if not isinstance(data, dict) or "names" not in data:
        raise UserError(f"{path} has no 'names'; it must be the data.yaml of a YOLO data set")
    return data


def _class_names(path: str, data: dict) -> list[str]:
    names: Any = data["names"]
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(str(i) for i in range(len(names))):
            raise UserError(f"{path}: the classes in 'names' are not numbered 0, 1, ...")
        names = [names[i] if i in names else names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: 'names' is no list of class names")
    if data.get("nc", len(names)) != len(names):
        raise UserError(f"{path}: nc is {data['nc']}, but {len(names)} names are listed")
    return [str(name) for name in names]


def _images(path: str, data: dict, split: str) -> list[str]:
    """Image files of a split: of folders, or of lists in text files."""
    parts = data.get(split)
    if not parts:
        known = [key for key in ("train", "val", "test") if data.get(key)]
        raise UserError(f"{path} has no {split!r}; it has {', '.join(known) or 'no images'}")
    root = Path(path).parent / str(data.get("path") or "")
    if not root.is_dir():
        root = Path(path).parent
    images: list[str] = []
    for part in parts if isinstance(parts, list) else [parts]:
        place = root / str(part)
        if not place.exists():  # Roboflow's files start one folder too high
            place = root / str(part).removeprefix("../")
        if place.is_dir():
            images += image_files(str(place))
        elif place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            images += [os.path.join(place.parent, line.strip()) for line in lines if line.strip()]
        else:
            raise UserError(f"{path}: {place} does not exist; correct {split!r} or 'path'")
    return images


def _label_file(image: str) -> str:
    """`labels/` instead of the last `images/`, and .txt."""
    parts = list(Path(image).with_suffix(".txt").parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return str(Path(*parts))


def _shape(line: str, place: str, classes: list[str], size: tuple[int, int]) -> Shape:
    try:
        number, *values = [float(word) for word in line.split()]
    except ValueError:
        raise UserError(f"{place}: not a class number and fractions; export it again") from None
    if number not in range(len(classes)):
        raise UserError(f"{place}: class {number:g} is not among the {len(classes)} of data.yaml")
    if len(values) == 4:
        raise UserError(f"{place}: a box without polygon; export the data set for segmentation")
    for value in values:
        if not -_SLACK <= value <= 1 + _SLACK:
            raise UserError(f"{place}: {value:g} is no fraction, 0 to 1; export it again")
    pixels = [round(value * side, 2) for value, side in zip(values, size * len(values))]
    return Shape(classes[int(number)], place, [polygon_of(pixels, place, size)])


def read_yolo(path: str, split: str = "train") -> Annotations:
    """One split of a data set; images without labels are background.

    Args:
        path: of `data.yaml`.
        split: "train", "val" or "test".

    Raises:
        UserError: one line naming the file and line of the first mistake.
    """
    data = _read_yaml(path)
    found = Annotations([], _class_names(path, data))
    unlabelled = 0
    for image in tqdm(_images(path, data, split), "YOLO", unit="", leave=False, disable=None):
        size, file = shown_size(image), _label_file(image)
        picture = Picture(image, size)
        found.pictures.append(picture)
        if not os.path.isfile(file):
            unlabelled += 1
            continue
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as e:
            raise UserError(f"{file} is no text file; export the labels again") from e
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{file} line {number}"
                picture.shapes.append(_shape(line, place, found.classes or [], size))
    if found.pictures and unlabelled == len(found.pictures):
        file = _label_file(found.pictures[0].path)
        raise UserError(f"{path}: no image of {split!r} has labels; the first would be {file}")
    if unlabelled:
        found.notes.append(f"{unlabelled} images have no label file and count as background")
    return found
