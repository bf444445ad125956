"""mAP^r: mean average precision by the overlap of regions, as MNC and FCIS report it on VOC 2012.

Hariharan et al., "Simultaneous Detection and Segmentation", ECCV 2014, with the details of the
evaluation code that MNC and FCIS were released with: every annotated object counts, none is
difficult, no pixel is void, the AP of a class is the mean of eleven points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.evaluation.average_precision import ClassDetections, class_average_precision
from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections

VOLUME_IOUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class MapR(NamedTuple):
    """AP^r by class and threshold, as fractions; nan for classes without any object."""

    class_names: list[str]
    ious: list[float]
    table: np.ndarray  # (classes, thresholds)

    def mean(self, iou: float) -> float:
        """mAP^r at one threshold: the mean of the classes that occur."""
        return _mean(self.table[:, self.ious.index(iou)])

    def volume(self) -> float:
        """mAP^r_vol: the mean of mAP^r at 0.1, 0.2, ..., 0.9."""
        return _mean(np.array([self.mean(iou) for iou in VOLUME_IOUS]))


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


class _Image(NamedTuple):
    """Detections of one image against its objects; arrays of length N."""

    classes: np.ndarray
    scores: np.ndarray
    overlaps: np.ndarray
    objects: np.ndarray
    crowd_cover: np.ndarray


def _overlaps(rles: list[dict], regions: list[dict], crowd: bool) -> np.ndarray:
    """(N, G) IoU of masks; with `crowd` the part of each detection inside the region."""
    if not rles or not regions:
        return np.zeros((len(rles), len(regions)))
    return np.asarray(mask_util.iou(rles, regions, [int(crowd)] * len(regions)))


def match_image(
    truth: GroundTruth, image: TruthImage, found: ImageDetections | None, first_object: int
) -> _Image:
    """The best object of its class for each detection in an image.

    Args:
        truth: the data set.
        image: one of its images.
        found: detections with masks, or None.
        first_object: number of the first object of this image; crowd regions get none.
    """
    count = 0 if found is None else len(found.scores)
    classes = np.zeros(0, np.int64) if found is None else found.classes
    scores = np.zeros(0) if found is None else found.scores_of(with_masks=True).astype(np.float64)
    overlaps, cover = np.full(count, -1.0), np.zeros(count)
    objects = np.zeros(count, np.int64)
    things = [a for a in image.annotations if not a["iscrowd"]]
    crowds = [a for a in image.annotations if a["iscrowd"]]
    rles = found.rles() if found is not None else []
    if count and things:
        ious = _overlaps(rles, [truth.rle(image, a) for a in things], crowd=False)
        labels = np.array([a["label"] for a in things])
        ious[classes[:, None] != labels[None]] = -1.0
        best = ious.argmax(axis=1)  # the first of several equal ones
        overlaps, objects = ious[np.arange(count), best], first_object + best
    if count and crowds:
        inside = _overlaps(rles, [truth.rle(image, a) for a in crowds], crowd=True)
        labels = np.array([a["label"] for a in crowds])
        inside[classes[:, None] != labels[None]] = 0.0
        cover = inside.max(axis=1)
    return _Image(classes, scores, overlaps, objects, cover)


def evaluate_mapr(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    ious: Sequence[float] = (0.5, 0.7),
    area: bool = False,
) -> MapR:
    """AP^r of all classes at `ious` and at the thresholds of mAP^r_vol.

    Args:
        truth: annotations.
        detections: by image of `truth`; None: nothing was found there.
        ious: thresholds in (0, 1].
        area: area under the curve instead of eleven points.
    """
    images, counts = [], np.zeros(len(truth.class_names), np.int64)
    for image, found in zip(truth.images, detections):
        things = [a["label"] for a in image.annotations if not a["iscrowd"]]
        images.append(match_image(truth, image, found, int(counts.sum())))
        np.add.at(counts, things, 1)
    merged = _Image(*(np.concatenate(x) for x in zip(*images))) if images else None
    ious = sorted({float(x) for x in [*ious, *VOLUME_IOUS]})
    table = np.full((len(counts), len(ious)), np.nan)
    for label, count in enumerate(counts):
        if not count or merged is None:
            continue
        chosen = merged.classes == label
        one = ClassDetections(
            merged.scores[chosen],
            merged.overlaps[chosen],
            merged.objects[chosen],
            merged.crowd_cover[chosen],
        )
        table[label] = [class_average_precision(one, int(count), iou, area) for iou in ious]
    return MapR(list(truth.class_names), ious, table)


def mapr_metrics(result: MapR, ious: Sequence[float], area: bool = False) -> dict[str, float]:
    """Metrics in percent: `mAPr@0.5` for each threshold, `mAPr_vol`, and `APr@0.5-class`.

    With `area` the names are `mAPr_area@0.5` and so on, as the numbers are others.
    """
    kind = "APr_area" if area else "APr"
    metrics = {f"m{kind}@{iou:g}": 100 * result.mean(float(iou)) for iou in ious}
    metrics[f"m{kind}_vol"] = 100 * result.volume()
    for iou in ious:
        column = result.table[:, result.ious.index(float(iou))]
        for name, value in zip(result.class_names, column):
            metrics[f"{kind}@{iou:g}-{name}"] = 100 * float(value)
    return metrics
