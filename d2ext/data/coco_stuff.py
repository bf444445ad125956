"""COCO 2017 with semantic maps for HTC, in the two layouts that people have on their disks:

- `coco_2017_{train,val}_stuff`: the maps of COCO-Stuff (stuffthingmaps_trainval2017.zip) of things
  and stuff: label = COCO category id - 1 (0..181, some unused), 255 = unlabelled.
- `coco_2017_{train,val}_panoptic_stuff`: detectron2's maps for Panoptic FPN, made of the panoptic
  annotations: 0 = any thing, 1..53 = stuff classes in the order of their ids, 255 = unlabelled.

Maps of the first kind serve as they are; `stuff_from_panoptic` and `stuff_from_pixelmap` make maps
from the panoptic PNGs and from COCO-Stuff's other release.
"""

import json
import os

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2ext.data.check.images import DECODE_ERRORS
from d2ext.data.register import load_coco_records
from d2ext.data.semantic import IGNORE_LABEL
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

# HTC's semantic output has 183 channels for the maps of COCO-Stuff, whose labels end at 181.
NUM_STUFFTHING_LABELS = 183
LAYOUTS = ("stuff", "panoptic_stuff")
_FOLDERS = {
    "stuff": "coco/stuffthingmaps/{split}2017",
    "panoptic_stuff": "coco/panoptic_stuff_{split}2017",
}
_HINTS = {
    "stuff": "unpack stuffthingmaps_trainval2017.zip of COCO-Stuff in its parent folder",
    "panoptic_stuff": "make the maps with tools/make_stuff_maps.py",
}


def coco_paths(split: str, root: str, layout: str) -> dict[str, str]:
    """`json_file`, `image_root` and `sem_seg_root` of a split, "train" or "val"."""
    return {
        "json_file": os.path.join(root, f"coco/annotations/instances_{split}2017.json"),
        "image_root": os.path.join(root, f"coco/{split}2017"),
        "sem_seg_root": os.path.join(root, _FOLDERS[layout].format(split=split)),
    }


def register_coco_stuff(name: str, split: str, root: str, layout: str) -> None:
    """Register COCO 2017 with the maps of one layout.

    Args:
        name: new data set name.
        split: "train" or "val".
        root: folder of all data sets.
        layout: one of `LAYOUTS`.
    """
    # detectron2 registers the plain COCO sets itself, for the root it saw when it was imported;
    # only their class metadata is used here.
    plain = MetadataCatalog.get(f"coco_2017_{split}")
    paths = coco_paths(split, root, layout)
    DatasetCatalog.register(name, lambda: load_coco_records(name, **paths))
    if layout == "stuff":
        labels = {"num_semantic_labels": NUM_STUFFTHING_LABELS}
    else:
        labels = {"stuff_classes": list(_panoptic_metadata().stuff_classes)}
    MetadataCatalog.get(name).set(
        thing_classes=plain.thing_classes,
        thing_dataset_id_to_contiguous_id=plain.thing_dataset_id_to_contiguous_id,
        ignore_label=IGNORE_LABEL,
        evaluator_type="coco",
        sem_seg_hint=f"{_HINTS[layout]}, or use coco_2017_{split}, whose labels are derived from "
        "the instances",
        **labels,
        **paths,
    )


def _panoptic_metadata():
    return MetadataCatalog.get("coco_2017_train_panoptic_separated")


def panoptic_stuff_labels(categories: list[dict]) -> dict[int, int]:
    """Label of every category id of a panoptic annotation file: 0 for things; stuff classes count
    from 1 in the order of their ids."""
    stuff = sorted(c["id"] for c in categories if not c["isthing"])
    labels = {c["id"]: 0 for c in categories}
    labels.update({own: i for i, own in enumerate(stuff, start=1)})
    return labels


def stuff_from_panoptic(
    panoptic: np.ndarray, segments: list[dict], labels: dict[int, int]
) -> np.ndarray:
    """Semantic map of a panoptic annotation.

    Args:
        panoptic: uint8 (H, W, 3) RGB; the id of a segment is R + 256 G + 256^2 B, 0 is unlabelled.
        segments: `segments_info` of the image: `id` and `category_id` each.
        labels: see `panoptic_stuff_labels`.

    Returns:
        uint8 (H, W).

    Raises:
        ValueError: a segment of the picture is not among `segments`.
    """
    ids = panoptic.astype(np.int64) @ np.array([1, 256, 256**2])
    known, inverse = np.unique(ids, return_inverse=True)
    table = {0: IGNORE_LABEL, **{s["id"]: labels[s["category_id"]] for s in segments}}
    unknown = [int(i) for i in known if int(i) not in table]
    if unknown:
        raise ValueError(f"segment {unknown[0]} is not in the annotations")
    return np.array([table[int(i)] for i in known], np.uint8)[inverse].reshape(ids.shape)


def stuff_from_pixelmap(labels: np.ndarray) -> np.ndarray:
    """Map in the numbering of stuffthingmaps, of one of COCO-Stuff's stuff_*2017_pixelmaps, whose
    labels are category ids (92..182, 183 = any thing) and 0 where nothing is labelled.

    Args:
        labels: uint8 (H, W).

    Returns:
        uint8 (H, W); any thing is 182.
    """
    return np.where(labels == 0, IGNORE_LABEL, labels.astype(np.int64) - 1).astype(np.uint8)


def convert_panoptic(json_file: str, panoptic_root: str, out: str) -> int:
    """Write a map `out/<stem>.png` for every image of a panoptic annotation file.

    Returns:
        number of maps.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            data = json.load(f)
        labels = panoptic_stuff_labels(data["categories"])
        segments = {a["file_name"]: a["segments_info"] for a in data["annotations"]}
    except OSError as e:
        raise UserError(f"cannot read {json_file}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{json_file} is not a COCO panoptic file: {e!r}") from e

    def convert(image, name):
        return stuff_from_panoptic(np.asarray(image.convert("RGB")), segments[name], labels)

    return _convert_all(panoptic_root, sorted(segments), out, convert)


def convert_pixelmaps(folder: str, out: str) -> int:
    """Write a map `out/<stem>.png` for every pixel map of COCO-Stuff in a folder.

    Returns:
        number of maps.

    Raises:
        UserError: no map there, or one is damaged or of another format.
    """
    names = sorted(n for n in os.listdir(folder) if n.endswith(".png"))
    if not names:
        raise UserError(f"{folder} holds no pixel maps (*.png)")

    def convert(image, name):
        if image.mode not in ("L", "P"):  # the index of a palette is the label
            raise ValueError(f"has mode {image.mode}, not 8 bits per pixel")
        return stuff_from_pixelmap(np.asarray(image))

    return _convert_all(folder, names, out, convert)


def _convert_all(folder, names, out, convert) -> int:
    os.makedirs(out, exist_ok=True)
    for name in tqdm(names, "maps", unit="", leave=False, disable=None):
        path = os.path.join(folder, name)
        try:
            with Image.open(path) as image:
                labels = convert(image, name)
        except (*DECODE_ERRORS, ValueError, KeyError) as e:
            raise UserError(f"cannot convert {path}: {' '.join(str(e).split())}") from e
        stem = os.path.splitext(os.path.basename(name))[0]
        Image.fromarray(labels).save(os.path.join(out, stem + ".png"))
    return len(names)
