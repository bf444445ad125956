"""Saved predictions: COCO results as an evaluation writes them (`coco_instances_results.json`), and
`predictions.json` of `d2ext predict`, which names files and classes instead of numbers of a set."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch

from d2ext.errors import UserError
from d2ext.evaluation.ground_truth import GroundTruth, annotation_rle
from d2ext.evaluation.predictions import ImageDetections

from detectron2.structures import Boxes, BoxMode, Instances

_NEEDED = {"image_id", "category_id", "bbox", "score"}


def read_results(path: str) -> list[dict]:
    """The entries of a results file.

    Raises:
        UserError: no such file, no JSON, or not a list of results.
    """
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    for index, result in enumerate(results if isinstance(results, list) else [None]):
        if not isinstance(result, dict) or not _NEEDED <= set(result):
            raise UserError(
                f"{path}, entry {index}: COCO results are a list of objects with "
                f"{', '.join(sorted(_NEEDED))}"
            )
        if not _is_box(result["bbox"]) or not _is_number(result["score"]):
            raise UserError(
                f"{path}, entry {index}: bbox has to be four finite numbers and score a finite one"
            )
    return results


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_box(box) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def fit_results(
    results: Sequence[dict], records: Sequence[dict], class_ids: dict[str, int], path: str
) -> list[dict]:
    """Results with the numbers of a data set, whichever kind they are.

    Args:
        results: of `read_results`. Those of `d2ext predict` have `file_name` and `category`; an
            image is found by its path, else by its name if only one has it.
        records: of the data set, with `file_name` and `image_id`.
        class_ids: name of a class -> `category_id` in the data set.
        path: of the results, for messages.

    Raises:
        UserError: an image or a class is not of the data set.
    """
    by_name = defaultdict(list)
    for record in records:
        by_name[os.path.basename(record["file_name"])].append(record)
    by_path = {os.path.realpath(r["file_name"]): r["image_id"] for r in records}
    known = {r["image_id"] for r in records}
    found: dict[str, object] = {}
    fitted = []
    for result in results:
        if "file_name" in result and "category" in result:
            file, name = result["file_name"], result["category"]
            if file not in found:
                same = by_name[os.path.basename(file)]
                only = same[0]["image_id"] if len(same) == 1 else None
                found[file] = by_path.get(os.path.realpath(file), only)
            if name not in class_ids:
                raise UserError(
                    f"{path} has the class '{name}', the data set has {', '.join(class_ids)}"
                )
            result = {**result, "image_id": found[file], "category_id": class_ids[name]}
            if found[file] is None:
                raise UserError(
                    f"{path} has results for {file}, which is not in the data set by its path, "
                    "nor is it the only one of its name"
                )
        elif result["image_id"] not in known:
            raise UserError(
                f"{path} has results for image {result['image_id']}, which is not in the set; "
                "they belong to another data set"
            )
        elif result["category_id"] not in class_ids.values():
            raise UserError(
                f"{path} has category {result['category_id']}, the data set has "
                f"{', '.join(map(str, sorted(class_ids.values())))}"
            )
        fitted.append(result)
    return fitted


def to_detections(
    results: Sequence[dict], truth: GroundTruth, path: str
) -> list[ImageDetections | None]:
    """Fitted results in the order of the images of a ground truth; None where there are none.

    Raises:
        UserError: masks in some results only, or of another size than the image.
    """
    labels = {category: label for label, category in enumerate(truth.category_ids)}
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    with_masks = [bool(r.get("segmentation")) for r in results]
    if any(with_masks) and not all(with_masks):
        raise UserError(
            f"{path}, entry {with_masks.index(False)} has no segmentation, but others have; it has "
            "to be in all of them or in none"
        )
    detections: list[ImageDetections | None] = []
    for image in truth.images:
        own = by_image.get(image.image_id)
        if not own:
            detections.append(None)
            continue
        boxes = np.array([r["bbox"] for r in own], dtype=np.float64)
        boxes[:, 2:] += boxes[:, :2]
        scored = all("mask_score" in r for r in own)
        detections.append(
            ImageDetections(
                image.image_id,
                tuple(image.size),
                boxes.astype(np.float32),
                np.array([r["score"] for r in own], dtype=np.float32),
                np.array([labels[r["category_id"]] for r in own], dtype=np.int64),
                [_counts(r, image, path) for r in own] if any(with_masks) else None,
                np.array([r["mask_score"] for r in own], dtype=np.float32) if scored else None,
            )
        )
    return detections


def _counts(result: dict, image, path: str) -> bytes:
    """The compressed run-length code of a mask."""
    try:
        rle = annotation_rle(result["segmentation"], image.size)
        size, counts = tuple(rle["size"]), rle["counts"]
        if size == tuple(image.size):
            mask_util.area(rle)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has a segmentation in image {image.image_id} that is neither polygons nor a "
            "run-length code"
        ) from error
    if size != tuple(image.size):
        raise UserError(
            f"{path} has masks of {size} (height, width) for image {image.image_id}, which is "
            f"{tuple(image.size)}"
        )
    return counts.encode() if isinstance(counts, str) else counts


def to_instances(results: list, size, class_ids: dict) -> Instances:
    """Instances of one image.

    Args:
        results: its COCO results: boxes x, y, width, height in pixels and, in all or none of them,
            run-length encoded masks.
        size: height and width of the image.
        class_ids: data set category id -> class index.

    Raises:
        UserError: a category or a mask that does not belong to the data set.
    """
    for result in results:
        if result["category_id"] not in class_ids:
            raise UserError(
                f"the results have category {result['category_id']}, the data set has "
                f"{', '.join(map(str, sorted(class_ids)))}"
            )
    boxes = np.asarray([r["bbox"] for r in results], dtype=np.float32).reshape(-1, 4)
    instances = Instances(
        size,
        pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
        pred_classes=torch.tensor([class_ids[r["category_id"]] for r in results]).long(),
        scores=torch.tensor([float(r["score"]) for r in results]),
    )
    if results and all("segmentation" in r for r in results):
        masks = np.stack([mask_util.decode(r["segmentation"]) for r in results])
        if masks.shape[1:] != tuple(size):
            raise UserError(
                f"the results have masks of {masks.shape[1:]} (height, width) for image "
                f"{results[0]['image_id']}, which is {tuple(size)}"
            )
        instances.pred_masks = torch.from_numpy(masks.astype(bool))
    return instances
