"""The built-in shapes data set on disk: `shapes_{train,val,big_train,big_val}`, and
`shapes_scenes_{train,val}` of large images, written on first use as PNG images, PNG semantic maps
and a COCO instances file.

Layout of one split, `<root>/shapes/<split>/`: `images/*.png`, `semantic/*.png` (uint8, 0..7 things,
8..11 stuff, 255 unlabelled), `annotations.json` and `manifest.json`, which is the last file written
and holds the format version, the size of every file and a hash of the content.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass

import cv2
import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock
from tqdm import tqdm

from d2ext.data.catalog import datasets_root
from d2ext.data.shapes.draw import STUFF_CLASSES, THING_CLASSES
from d2ext.data.shapes.scene import LARGE, Style, make_scene
from d2ext.errors import UserError

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Number of images and random seed of one split; seeds differ, so no image is shared."""

    num_images: int
    seed: int
    style: Style = Style()


SPLITS = {
    "train": Split(500, 1),
    "val": Split(200, 2),
    "big_train": Split(4000, 3),
    "big_val": Split(500, 4),
    "scenes_train": Split(24, 5, LARGE),
    "scenes_val": Split(100, 6, LARGE),
}


def split_folder(split, root=None):
    """Folder of one split below `root` (default `datasets_root()`)."""
    return os.path.join(root or datasets_root(), "shapes", split)


def _annotation(mask, category, image_id, annotation_id, iscrowd=0):
    """COCO annotation of a bool mask (H, W); bbox is XYWH with width = xmax + 1 - xmin."""
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category + 1,
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
        "area": float(mask.sum()),
        "bbox": [float(v) for v in (x, y, columns[-1] + 1 - x, rows[-1] + 1 - y)],
        "iscrowd": iscrowd,
    }


def _empty_dataset(split):
    return {
        "info": {"description": f"d2ext shapes, split {split}", "version": str(FORMAT_VERSION)},
        "licenses": [],
        "images": [],
        "annotations": [],
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "shape"}
            for i, name in enumerate(THING_CLASSES)
        ],
    }


class _ContentHash:
    """SHA-256 over decoded pixels and canonical JSON, independent of the PNG encoder."""

    def __init__(self):
        self._sha = hashlib.sha256()

    def add_image(self, name, image, semantic):
        for array in (image, semantic):
            self._sha.update(f"{name} {array.shape} {array.dtype}".encode())
            self._sha.update(np.ascontiguousarray(array).tobytes())

    def finish(self, dataset):
        self._sha.update(json.dumps(dataset, sort_keys=True, separators=(",", ":")).encode())
        return self._sha.hexdigest()


def _write(folder, relative, data, sizes):
    with open(os.path.join(folder, relative), "wb") as f:
        f.write(data)
    sizes[relative] = len(data)


def _write_split(folder, split, num_images):
    """Fill an empty folder; returns the manifest."""
    for name in ("images", "semantic"):
        os.makedirs(os.path.join(folder, name))
    dataset, sizes, content = _empty_dataset(split), {}, _ContentHash()
    for index in tqdm(range(num_images), desc=f"shapes/{split}", unit="image", mininterval=1.0):
        scene = make_scene((FORMAT_VERSION, SPLITS[split].seed, index), SPLITS[split].style)
        image_id, name = index + 1, f"{index + 1:06d}.png"
        height, width = scene.semantic.shape
        objects = [(mask, c, 0) for mask, c in zip(scene.masks, scene.categories)]
        objects += [(*scene.crowd, 1)] if scene.crowd else []
        for mask, category, iscrowd in objects:
            annotation_id = len(dataset["annotations"]) + 1
            annotation = _annotation(mask, category, image_id, annotation_id, iscrowd)
            dataset["annotations"].append(annotation)
        dataset["images"].append(
            {"id": image_id, "file_name": name, "width": width, "height": height, "license": 0}
        )
        content.add_image(name, scene.image, scene.semantic)
        for sub, array in (("images", scene.image[..., ::-1]), ("semantic", scene.semantic)):
            png = cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes()
            _write(folder, f"{sub}/{name}", png, sizes)
    _write(folder, "annotations.json", json.dumps(dataset).encode(), sizes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "num_images": num_images,
        "content_sha256": content.finish(dataset),
        "file_sizes": sizes,
    }
    with open(os.path.join(folder, "manifest.json"), "w") as f:
        json.dump(manifest, f)
    return manifest


def read_manifest(folder):
    """Manifest of a generated split as a dict, or None when it is missing or unreadable."""
    try:
        with open(os.path.join(folder, "manifest.json")) as f:
            manifest = json.load(f)
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def find_damage(folder, split, num_images):
    """Why a folder cannot be used as it is: a short text, or None when it is complete."""
    if not os.path.isdir(folder):
        return "folder is missing"
    manifest = read_manifest(folder)
    if manifest is None:
        return "manifest.json is missing or unreadable"
    wanted = {"format_version": FORMAT_VERSION, "split": split, "num_images": num_images}
    for key, value in wanted.items():
        if manifest.get(key) != value:
            return f"{key} is {manifest.get(key)!r} instead of {value!r}"
    for relative, size in manifest["file_sizes"].items():
        path = os.path.join(folder, relative)
        if not os.path.isfile(path):
            return f"{relative} is missing"
        if os.path.getsize(path) != size:
            return f"{relative} has the wrong size"
    return None


def content_hash(folder):
    """Recompute the content hash of a generated split from its files, as a hex string."""
    with open(os.path.join(folder, "annotations.json")) as f:
        dataset = json.load(f)
    content = _ContentHash()
    for record in dataset["images"]:
        name = record["file_name"]
        image = cv2.imread(os.path.join(folder, "images", name), cv2.IMREAD_COLOR)[..., ::-1]
        semantic = cv2.imread(os.path.join(folder, "semantic", name), cv2.IMREAD_UNCHANGED)
        content.add_image(name, image, semantic)
    return content.finish(dataset)


def generate(split, root=None, num_images=None):
    """Make sure that a split exists on disk; writes it if it is missing or damaged.

    Safe to call from several processes at once: they take turns by a lock file, and a folder gets
    its final name only when it is complete.

    Args:
        split: a key of `SPLITS`.
        root: folder of all data sets, default `datasets_root()` at the time of the call.
        num_images: only the first images of the split; they equal those of the full split.

    Returns:
        the folder of the split.

    Raises:
        UserError: unknown split name, or the folder cannot be written.
    """
    if split not in SPLITS:
        raise UserError(f"unknown shapes split {split!r}; known: {', '.join(SPLITS)}")
    num_images = SPLITS[split].num_images if num_images is None else num_images
    folder = split_folder(split, root)
    if find_damage(folder, split, num_images) is None:
        return folder
    try:
        _replace(folder, split, num_images)
    except OSError as e:
        raise UserError(
            f"cannot write {folder}: {e}; set DETECTRON2_DATASETS to a writable folder"
        ) from e
    return folder


def _replace(folder, split, num_images):
    """Write a split under a temporary name and rename it; one process at a time."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with file_lock(folder):
        damage = find_damage(folder, split, num_images)
        if damage is None:
            return  # another process was faster
        exists = os.path.isdir(folder)
        logger.info("%s %s: %s", "Regenerating" if exists else "Generating", folder, damage)
        work = tempfile.mkdtemp(prefix=f".{split}-", dir=os.path.dirname(folder))
        try:
            new, old = os.path.join(work, "new"), os.path.join(work, "old")
            os.makedirs(new)
            _write_split(new, split, num_images)
            if exists:
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def stuff_classes():
    """Names of all semantic labels: the thing classes (0..7), then the stuff classes (8..11)."""
    return [*THING_CLASSES, *STUFF_CLASSES]
