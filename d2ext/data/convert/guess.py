"""Recognises the formats that can be converted, for the message where a COCO file is needed."""

import itertools
import json
from pathlib import Path

_LOOKED_AT = 50  # files of a folder
_COMMAND = "d2ext convert"


def _is_labelme(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8-sig") as f:
            data = json.load(f)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and isinstance(data.get("shapes"), list)


def conversion_hint(path: str) -> str:
    """The command that makes a COCO file of a file or folder; empty if it is of no known form."""
    place = Path(path)
    if place.is_file():
        if place.suffix == ".json" and _is_labelme(place):
            return f"{_COMMAND} labelme {place.parent} --output annotations.json"
        if place.suffix in (".yaml", ".yml"):
            return f"{_COMMAND} yolo {path} --output annotations.json"
        return ""
    if not place.is_dir():
        return ""
    for name in ("data.yaml", "dataset.yaml"):
        if (place / name).is_file():
            return f"{_COMMAND} yolo {place / name} --output annotations.json"
    if (place / "_annotations.coco.json").is_file():
        return f"{_COMMAND} roboflow {place / '_annotations.coco.json'} --output annotations.json"
    exports = sorted(place.glob("annotations/instances*.json"))
    if exports:
        return f"{_COMMAND} cvat {exports[0]} --output annotations.json"
    if any(map(_is_labelme, itertools.islice(place.glob("*.json"), _LOOKED_AT))):
        return f"{_COMMAND} labelme {path} --output annotations.json"
    if any(itertools.chain(place.glob("*.png"), place.glob("*/*.png"))):
        return f"{_COMMAND} masks {path} --images FOLDER --output annotations.json"
    return ""
