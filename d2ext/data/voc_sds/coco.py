"""VOC SDS as a COCO instances file: the conversion, and the file as a cache of the `.mat` files.

Reading eleven thousand pairs of `.mat` files takes a while, so the converted annotations are kept.
The file holds a key of the image list and of the size and time of every source file; it is made
anew when the key differs.
"""

import hashlib
import json
import logging
import os
import re
import sys

import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from d2ext.data.json_files import write_json
from d2ext.data.voc_sds.files import (
    CLASSES,
    SPLITS,
    find_folder,
    image_file,
    mat_file,
    read_instances,
    read_list,
)

from detectron2.utils import comm

_FORMAT = 1  # part of the key: raise it when the content of the file changes
_VOC_NAME = re.compile(r"(\d{4})_(\d{6})")
logger = logging.getLogger(__name__)


def _image_ids(names: list[str]) -> list[int]:
    """COCO needs numbers: 2008_000008 becomes 2008000008; other names are counted from 1."""
    matches = [_VOC_NAME.fullmatch(name) for name in names]
    if all(matches):
        return [int(match.group(1) + match.group(2)) for match in matches]
    return list(range(1, len(names) + 1))


def _annotations(instances, image_id: int, first_id: int) -> list[dict]:
    annotations = []
    for number, category in zip(instances.ids, instances.classes):
        mask = np.asfortranarray(instances.labels == number, dtype=np.uint8)
        rle = mask_util.encode(mask)
        annotations.append(
            {
                "id": first_id + len(annotations),
                "image_id": image_id,
                "category_id": category,
                "bbox": mask_util.toBbox(rle).tolist(),
                "area": int(mask_util.area(rle)),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
            }
        )
    return annotations


def convert_split(folder: str, split: str, root: str) -> dict:
    """The annotations of a split in COCO's instances format.

    Category ids are 1..20 in alphabetical order, as in the `.mat` files. Boxes are the tight
    `[x, y, width, height]` of the masks (exclusive far edge), areas count pixels.

    Args:
        folder: of the released files.
        split: `"train"` or `"val"`.
        root: the `file_name` of an image is relative to this folder.

    Raises:
        UserError: one line naming the first file that is missing or broken.
    """
    names = read_list(folder, split)
    images, annotations = [], []
    quiet = not comm.is_main_process() or not sys.stderr.isatty()
    for name, image_id in zip(
        tqdm(names, desc=f"VOC SDS {split}", unit="img", disable=quiet, leave=False),
        _image_ids(names),
    ):
        instances = read_instances(folder, name)
        height, width = instances.labels.shape
        file_name = os.path.relpath(instances.file_name, root)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        annotations += _annotations(instances, image_id, len(annotations) + 1)
    return {
        "info": {"description": f"PASCAL VOC 2012 SDS {split}, converted from SBD"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }


def _state(path: str | None) -> str:
    try:
        status = os.stat(path)
    except (OSError, TypeError):  # missing: read_instances says so
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def cache_key(folder: str, split: str, root: str) -> str:
    """Hash of everything that `convert_split` depends on: names, sizes and times of the files."""
    digest = hashlib.sha256(f"{_FORMAT} {os.path.relpath(folder, root)}\n".encode())
    for name in read_list(folder, split):
        files = [mat_file(folder, kind, name) for kind in ("inst", "cls")]
        states = [_state(path) for path in [*files, image_file(folder, name)]]
        digest.update(f"{name} {' '.join(states)}\n".encode())
    return digest.hexdigest()


def _cached_key(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)["info"]["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def update_cache(split: str, root: str, path: str) -> None:
    """Make `path` the COCO instances file of a split, unless it is that already.

    Raises:
        UserError: files missing or broken, or `path` cannot be written.
    """
    folder = find_folder(root)
    key = cache_key(folder, split, root)
    if _cached_key(path) == key:
        return
    logger.info("Converting the VOC SDS annotations in %s, which is needed once", folder)
    data = convert_split(folder, split, root)
    if len(data["images"]) != SPLITS[split]:
        logger.warning(
            "VOC SDS %s has %d images, not the %d of the released list: "
            "results are not comparable with published ones",
            *(split, len(data["images"]), SPLITS[split]),
        )
    data["info"]["key"] = key
    write_json(data, path)
