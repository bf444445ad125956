"""COCO files as CVAT and Roboflow export them, made regular: ids from 1, areas and boxes of the
masks, no empty root class.

Roboflow adds a class that no object has, the supercategory of all others. CVAT marks what was
painted with its brush as crowd regions, which training and evaluation ignore; they are objects.
"""

import os
from typing import Any

import pycocotools.mask as mask_util
from tqdm import tqdm

from d2ext.data.check.coco_file import read_coco_file
from d2ext.data.check.rle import compressed_run_sums, list_run_sums
from d2ext.data.convert.objects import Annotations, Picture, Shape, polygon_of, shown_size
from d2ext.data.json_files import Places
from d2ext.errors import UserError


def _names(data: dict) -> dict[Any, str]:
    """{category id: name} by ascending id, without a root class."""
    used = [a["category_id"] for a in data["annotations"]]
    parents = [c.get("supercategory") for c in data["categories"]]
    several = len(data["categories"]) > 1
    kept = [
        c
        for c in data["categories"]
        if not (several and c["id"] == 0 and c["name"] in parents and 0 not in used)
    ]
    return {c["id"]: c["name"] for c in sorted(kept, key=lambda c: c["id"])}


def _encoded(mask: dict, place: str, size: tuple[int, int]) -> dict:
    width, height = size
    if mask.get("size") != [height, width]:
        raise UserError(f"{place}: its mask is not of the size of the picture; export it again")
    counts, total = mask.get("counts"), -1
    if isinstance(counts, list):
        total, _ = list_run_sums(counts)
    elif isinstance(counts, str):
        total = compressed_run_sums([counts.encode()]).total[0]
    if total != width * height:
        raise UserError(f"{place}: its mask cannot be decoded; export it again")
    rle = {"size": [height, width], "counts": counts}
    return mask_util.frPyObjects(rle, height, width) if isinstance(counts, list) else rle


def read_coco_export(path: str, image_root: str, crowds_are_objects: bool = False) -> Annotations:
    """A COCO instances file with all images below a folder.

    Args:
        crowds_are_objects: what has `iscrowd` is an object like others, as in CVAT's files.

    Raises:
        UserError: one line naming the file and line of the first mistake.
    """
    data = read_coco_file(path, unique_names=False)  # the root may be named as a class is
    names = _names(data)
    image_places, places = Places(path, "images"), Places(path, "annotations")
    pictures: dict[Any, Picture] = {}
    images = tqdm(data["images"], "images", unit="", leave=False, disable=None)
    for index, image in enumerate(images):
        file = os.path.join(image_root, str(image["file_name"]))
        if type(image["id"]) not in (int, str) or image["id"] in pictures:
            place = image_places[index]
            raise UserError(f"{place}: the id {image['id']!r} is none, or that of another image")
        if not os.path.isfile(file):
            place = image_places[index]
            raise UserError(f"{place}: image {file} does not exist; name its folder: --images")
        stated = (image["width"], image["height"])
        pictures[image["id"]] = Picture(file, shown_size(file, path, stated))
    found = Annotations(list(pictures.values()), list(names.values()))
    crowds = 0
    for index, annotation in enumerate(data["annotations"]):
        keys = [annotation[key] for key in ("image_id", "category_id")]
        picture, name = (
            known.get(key) if type(key) in (int, str) else None
            for known, key in zip((pictures, names), keys)
        )
        if picture is None or name is None:
            key = "image_id" if picture is None else "category_id"
            raise UserError(f"{places[index]}: unknown {key} {annotation[key]!r}; export it again")
        crowd = bool(annotation.get("iscrowd"))
        crowds += crowd
        # Places are looked up for messages only: that needs another reading of the file.
        shape = Shape(name, f"{path} annotation {annotation['id']}")
        shape.crowd = crowd and not crowds_are_objects
        try:
            _fill(shape, annotation["segmentation"], picture.size)
        except UserError as e:
            text = str(e).removeprefix(shape.place)
            raise UserError(places[index] + text) from e
        picture.shapes.append(shape)
    if crowds and crowds_are_objects:
        found.notes.append(f"{crowds} masks marked as crowds are taken as objects: --keep-crowds")
    return found


def _fill(shape: Shape, segmentation: Any, size: tuple[int, int]) -> None:
    if isinstance(segmentation, dict):
        shape.masks.append(_encoded(segmentation, shape.place, size))
    elif isinstance(segmentation, list) and segmentation:
        shape.polygons += [polygon_of(points, shape.place, size) for points in segmentation]
    else:
        raise UserError(f"{shape.place}: has a box only; export the data set for segmentation")
