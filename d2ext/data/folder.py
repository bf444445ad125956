"""A folder as `d2ext split` writes it, taken as the data of a training: `train.json` and, to
evaluate on, `val.json` and `test.json`."""

import os
import re
from pathlib import Path

from d2ext.data.json_files import read_json
from d2ext.data.remote import is_address, local_path
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog

PARTS = ("train", "val", "test")
IMAGES = "image_folder"  # in a COCO file's `info`: where its images are, seen from the file


def find_data(data: str, images: str | None = None) -> tuple[dict[str, str], list[str]]:
    """The data sets that one word stands for.

    Args:
        data: a folder with `train.json`, `val.json`, `test.json` (COCO instances, some of them),
            its address (`s3://bucket/mydata`), or the name of registered sets: `shapes` for
            `shapes_train` and `shapes_val`.
        images: folder of the images; default: what the files say in `info`, else `images` in the
            folder, else the folder.

    Returns:
        part -> registered name, and a `--register` text for each that is a file.

    Raises:
        UserError: neither of these, or there are no images.
    """
    name = data.rstrip("/").rpartition("/")[2] if is_address(data) else Path(data).resolve().name
    data, images = local_path(data), images and local_path(images)
    if not os.path.isdir(data):
        return _registered(data), []
    files = {part: Path(data, f"{part}.json") for part in PARTS}
    files = {part: file for part, file in files.items() if file.is_file()}
    if not files:
        raise UserError(
            f"--data {data}: the folder has no train.json, val.json or test.json; make them with "
            "d2ext split, or name the files with --register"
        )
    stem = re.sub(r"[^\w.\-]", "_", name)
    names = {part: f"{stem}_{part}" for part in files}
    texts = [f"{names[part]}={file},{_image_root(file, images)}" for part, file in files.items()]
    return names, texts


def _registered(name: str) -> dict[str, str]:
    known = DatasetCatalog.list()
    found = {part: f"{name}_{part}" for part in PARTS if f"{name}_{part}" in known}
    if not found and name in known:
        found = {"train": name}
    if not found:
        what = "a file; split it first (d2ext split), or name it" if os.path.isfile(name) else None
        raise UserError(
            f"--data {name} is {what or 'neither a folder nor a registered data set; name files'} "
            "with --register NAME=ANN.json,IMAGES"
        )
    return found


def _image_root(file: Path, images: str | None) -> str:
    said = None if images else _said_in(file)
    wanted: list[str | Path] = [images] if images else [file.parent / "images", file.parent]
    places = [said, *wanted] if said else wanted
    for place in places:
        if os.path.isdir(place):
            return os.path.normpath(place)
    raise UserError(f"image folder {places[0]} does not exist; name it: --images FOLDER")


def _said_in(file: Path) -> Path | None:
    content = read_json(str(file))
    info = content.get("info") if isinstance(content, dict) else None
    folder = info.get(IMAGES) if isinstance(info, dict) else None
    return file.parent / folder if isinstance(folder, str) else None
