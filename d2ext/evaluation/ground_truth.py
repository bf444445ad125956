"""The annotations that results are compared with: a COCO instances file in one normal form."""

import contextlib
import json
import os
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager


class TruthImage(NamedTuple):
    """One image, with its annotations in the order of the file."""

    image_id: Any
    size: tuple  # (height, width)
    annotations: list[dict]  # see GroundTruth


class GroundTruth(NamedTuple):
    """Images in the order of the file, and the classes.

    An annotation has `bbox` (x, y, width, height), `segmentation` as in the file, `area`, `iscrowd`
    (0 or 1) and `label`, the contiguous class.
    """

    images: list[TruthImage]
    class_names: list[str]
    category_ids: list[int]  # of the file, by contiguous class

    def rle(self, image: TruthImage, annotation: dict) -> dict:
        """Compressed run-length code of an annotation.

        Raises:
            UserError: it has none, or one of another size than the image.
        """
        segmentation = annotation["segmentation"]
        if not segmentation:
            raise UserError(f"an annotation of image {image.image_id!r} has no segmentation")
        rle = annotation_rle(segmentation, image.size)
        if tuple(rle["size"]) != tuple(image.size):
            raise UserError(
                f"image {image.image_id!r} is (height, width) {tuple(image.size)}, "
                f"the mask of an annotation {tuple(rle['size'])}"
            )
        return rle


def annotation_rle(segmentation, size) -> dict:
    """Compressed run-length code of polygons or of either kind of run-length code."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def _area(annotation: dict, size) -> float:
    if "area" in annotation:
        return annotation["area"]
    if annotation.get("segmentation"):
        return float(mask_util.area(annotation_rle(annotation["segmentation"], size)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _dataset(name: str, metadata) -> dict:
    path = metadata.get("json_file")
    if not path:
        return convert_to_coco_dict(name)
    path = PathManager.get_local_path(path)
    if not os.path.isfile(path):
        with contextlib.suppress(FileNotFoundError):
            DatasetCatalog.get(name)  # some sets make their file when they are first used
    if not os.path.isfile(path):
        raise UserError(f"data set {name!r}: annotation file {path} does not exist")
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {' '.join(str(e).split())}") from None


def load_ground_truth(name: str) -> GroundTruth | None:
    """Annotations of a registered data set; None if its file has none (a test set).

    Raises:
        UserError: no readable file, or a category that the data set does not have.
    """
    metadata = MetadataCatalog.get(name)
    dataset = _dataset(name, metadata)
    if "annotations" not in dataset:
        return None
    categories = sorted(dataset["categories"], key=lambda c: c["id"])
    mapping: dict[int, int] = metadata.get("thing_dataset_id_to_contiguous_id") or {
        c["id"]: i for i, c in enumerate(categories)
    }
    names = metadata.get("thing_classes") or [c["name"] for c in categories]
    images = {
        image["id"]: TruthImage(image["id"], (image["height"], image["width"]), [])
        for image in dataset["images"]
    }
    for annotation in dataset["annotations"]:
        image = images[annotation["image_id"]]
        if annotation["category_id"] not in mapping:
            raise UserError(
                f"data set {name!r}: an annotation of image {image.image_id!r} has the unknown "
                f"category_id {annotation['category_id']!r}"
            )
        image.annotations.append(
            {
                "bbox": annotation["bbox"],
                "segmentation": annotation.get("segmentation"),
                "area": _area(annotation, image.size),
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "label": mapping[annotation["category_id"]],
            }
        )
    category_ids = [c for c, _ in sorted(mapping.items(), key=lambda item: item[1])]
    return GroundTruth(list(images.values()), list(names), category_ids)


def by_image(truth: GroundTruth, detections) -> list:
    """Detections in the order of the images of the ground truth; None where there are none.

    Raises:
        UserError: detections in an image that is not of this data set, of another size than it, or
            of a class that it lacks.
    """
    positions = {image.image_id: i for i, image in enumerate(truth.images)}
    ordered = [None] * len(positions)
    for found in detections:
        position = positions.get(found.image_id)
        if position is None:
            raise UserError(f"detections in image {found.image_id!r}, which the data set lacks")
        size = truth.images[position].size
        if tuple(found.size) != tuple(size):
            raise UserError(
                f"image {found.image_id!r} is (height, width) {tuple(size)} in the annotations, "
                f"but {tuple(found.size)} in the predictions"
            )
        if len(found.classes) and not _in_range(found.classes, len(truth.class_names)):
            raise UserError(
                f"image {found.image_id!r} has a detection of class {int(np.max(found.classes))}; "
                f"the data set has {len(truth.class_names)} classes"
            )
        ordered[position] = found
    return ordered


def _in_range(classes, count):
    return classes.min() >= 0 and classes.max() < count
