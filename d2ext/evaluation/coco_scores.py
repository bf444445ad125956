"""COCO's AP and AR of boxes, masks and mask boundaries, by faster-coco-eval where it is installed
and by pycocotools elsewhere. Both get the same annotations in one normal form, and their tables are
summarised here, so that they differ in speed only.
"""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.evaluation.boundary import boundary_rle
from d2ext.evaluation.ground_truth import GroundTruth
from d2ext.evaluation.predictions import ImageDetections, to_coco

KINDS = ("bbox", "segm", "boundary")
IMPLEMENTATIONS = ("faster-coco-eval", "pycocotools")
MAX_DETECTIONS = (1, 10, 100)
_AREAS = ("", "s", "m", "l")


class CocoTables(NamedTuple):
    """What COCO evaluation accumulates; -1 where there is nothing to be found."""

    precision: np.ndarray  # (10 thresholds 0.5:0.95, 101 recalls, classes, 4 areas, 3 limits)
    recall: np.ndarray  # (10 thresholds, classes, 4 areas, 3 limits)
    limits: tuple[int, ...] = MAX_DETECTIONS  # of detections per image and class


def default_implementation() -> str:
    """The fastest implementation that is installed."""
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    return IMPLEMENTATIONS[0] if installed else IMPLEMENTATIONS[1]


def _api(implementation: str):
    """(COCO, COCOeval) classes of an implementation."""
    if implementation == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        # Its own log lines say nothing that is not in the results.
        logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
        return COCO, COCOeval_faster
    if implementation == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    raise ValueError(f"unknown implementation {implementation!r}; known: {IMPLEMENTATIONS}")


def _truth_entries(truth: GroundTruth, with_masks: bool):
    """Images and annotations; ids count from 1 in the order of the image ids.

    An annotation id of 0 would mean "not matched" in both implementations.
    """
    order = sorted(range(len(truth.images)), key=lambda i: truth.images[i].image_id)
    images, annotations = [], []
    for number, index in enumerate(order, start=1):
        image = truth.images[index]
        height, width = image.size
        images.append({"id": number, "height": height, "width": width})
        for a in image.annotations:
            entry = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": a["label"] + 1,
                "bbox": list(a["bbox"]),
                "area": a["area"],
                "iscrowd": a["iscrowd"],
            }
            if with_masks:
                entry["segmentation"] = truth.rle(image, a)
            annotations.append(entry)
    return order, images, annotations


def _found_entries(order, detections, num_classes: int, with_masks: bool):
    """Detections with the fields that COCO's `loadRes` would add: the area is that of the mask when
    masks are compared, else that of the box; so is the score, where masks have one."""
    entries = []
    for number, index in enumerate(order, start=1):
        if detections[index] is None:
            continue
        for entry in to_coco(detections[index], number, range(1, num_classes + 1)):
            mask_score = entry.pop("mask_score", entry["score"])
            if with_masks:
                entry["score"] = mask_score
                entry["area"] = float(mask_util.area(entry["segmentation"]))
                entry["bbox"] = mask_util.toBbox(entry["segmentation"]).tolist()
            else:
                entry.pop("segmentation", None)
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            entry.update(id=len(entries) + 1, iscrowd=0)
            entries.append(entry)
    return entries


def _limit_by_boundary(evaluation, annotations, found, max_detections: int) -> None:
    """Make IoU the smaller of mask IoU and boundary IoU; in crowd regions it stays what it is."""
    groups: dict[tuple, tuple] = {}
    for place, entries in enumerate((annotations, found)):
        for entry in entries:
            key = entry["image_id"], entry["category_id"]
            groups.setdefault(key, ([], []))[place].append(entry)
    mask_iou: Callable = evaluation.computeIoU

    def compute(image_id, category_id):
        ious = mask_iou(image_id, category_id)
        objects, detections = groups.get((image_id, category_id), ([], []))
        crowd = np.array([bool(o["iscrowd"]) for o in objects])
        if len(ious) == 0 or crowd.all():
            return ious
        # COCO evaluation orders and cuts the rows like this.
        order = np.argsort([-d["score"] for d in detections], kind="mergesort")
        best = [detections[i] for i in order[:max_detections].tolist()]
        rows = [boundary_rle(d["segmentation"]) for d in best]
        columns = [boundary_rle(o["segmentation"]) for o, c in zip(objects, crowd) if not c]
        ious = np.array(ious)
        near = np.asarray(mask_util.iou(rows, columns, [0] * len(columns)))
        ious[:, ~crowd] = np.minimum(ious[:, ~crowd], near)
        return ious

    evaluation.computeIoU = compute


def evaluate_coco(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    kind: str,
    implementation: str | None = None,
    max_detections: int = MAX_DETECTIONS[-1],
) -> CocoTables:
    """COCO evaluation of all detections.

    Args:
        truth: annotations.
        detections: by image of `truth`; None: nothing was found there.
        kind: `"bbox"`, `"segm"`, or `"boundary"`: masks with boundary IoU.
        implementation: one of `IMPLEMENTATIONS`, default the fastest that is installed.
        max_detections: score so many of each image and class, COCO's 100 at least; negative: all.
    """
    evaluation = match_coco(truth, detections, kind, implementation, max_detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    limits = tuple(evaluation.params.maxDets)
    return CocoTables(
        np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"]), limits
    )


def match_coco(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    kind: str,
    implementation: str | None = None,
    max_detections: int = MAX_DETECTIONS[-1],
) -> Any:
    """The first half of `evaluate_coco`: the implementation's evaluation with matches in every
    image, not yet accumulated."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {KINDS}")
    with_masks = kind != "bbox"
    coco_class, evaluation_class = _api(implementation or default_implementation())
    if max_detections < 0:
        max_detections = max((len(x.scores) for x in detections if x is not None), default=0)
    limits = (*MAX_DETECTIONS[:-1], max(max_detections, MAX_DETECTIONS[-1]))
    order, images, annotations = _truth_entries(truth, with_masks)
    found = _found_entries(order, detections, len(truth.class_names), with_masks)
    categories = [{"id": i, "name": n} for i, n in enumerate(truth.class_names, start=1)]
    apis = []
    with contextlib.redirect_stdout(io.StringIO()):
        for entries in (annotations, found):
            api = coco_class()
            api.dataset = {"images": images, "annotations": entries, "categories": categories}
            api.createIndex()
            apis.append(api)
        evaluation = evaluation_class(*apis, iouType="segm" if with_masks else "bbox")
        evaluation.params.maxDets = list(limits)
        if kind == "boundary":
            _limit_by_boundary(evaluation, annotations, found, limits[-1])
        evaluation.evaluate()
    return evaluation


def percent(values: np.ndarray) -> float:
    """Mean of the entries that exist, in percent; nan if none does."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else float("nan")


def coco_metrics(tables: CocoTables, class_names: Sequence[str]) -> dict[str, float]:
    """Metrics in percent, under detectron2's names: `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, and
    with several classes `AP-class`; and `AR@1`, `AR@10`, `AR@100` (or the limit instead of 100),
    `ARs`, `ARm`, `ARl`."""
    precision, recall, limits = tables
    metrics = {
        "AP": percent(precision[:, :, :, 0, -1]),
        "AP50": percent(precision[0, :, :, 0, -1]),
        "AP75": percent(precision[5, :, :, 0, -1]),
    }
    for index, suffix in list(enumerate(_AREAS))[1:]:
        metrics[f"AP{suffix}"] = percent(precision[:, :, :, index, -1])
    for index, limit in enumerate(limits):
        metrics[f"AR@{limit}"] = percent(recall[:, :, 0, index])
    for index, suffix in list(enumerate(_AREAS))[1:]:
        metrics[f"AR{suffix}"] = percent(recall[:, :, index, -1])
    if len(class_names) > 1:
        for index, name in enumerate(class_names):
            metrics[f"AP-{name}"] = percent(precision[:, :, index, 0, -1])
    return metrics


def class_rows(tables: CocoTables, class_names: Sequence[str]) -> list[list]:
    """Rows `[class, AP, AP50, AP75, APs, APm, APl, AR@100]` for a table, in percent."""
    precision, recall, _ = tables
    rows = []
    for index, name in enumerate(class_names):
        own = precision[:, :, index, :, -1]
        values = [own[:, :, 0], own[0, :, 0], own[5, :, 0], *(own[:, :, i] for i in (1, 2, 3))]
        rows.append([name, *map(percent, values), percent(recall[:, index, 0, -1])])
    return rows
