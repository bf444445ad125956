"""COCO's matches of detections and objects as arrays, by class and size of objects: what AP,
its bootstrap, precision-recall curves and calibration are computed from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from d2ext.evaluation.coco_scores import MAX_DETECTIONS, match_coco
from d2ext.evaluation.ground_truth import GroundTruth
from d2ext.evaluation.predictions import ImageDetections

SIZES = ("", "s", "m", "l")  # all objects, small, medium and large ones
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0, 1, 101)
_TINY = np.spacing(1)  # as in pycocotools, so that the numbers are the same


class ClassMatches(NamedTuple):
    """Detections of one class by descending score; T = 10 thresholds, N detections, I images.

    Images are numbered in the order of their ids.
    """

    scores: np.ndarray  # float (N,)
    images: np.ndarray  # int (N,)
    hits: np.ndarray  # bool (T, N): has an object of its own
    ignored: np.ndarray  # bool (T, N): in a crowd region, or of another size: does not count
    objects: np.ndarray  # int (I,): to be found in each image


def coco_matches(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    kind: str,
    max_detections: int = MAX_DETECTIONS[-1],
) -> list[list[ClassMatches]]:
    """Matches by class, then by size as in `SIZES`.

    Args:
        truth, detections, kind, max_detections: as for `evaluate_coco`.
    """
    evaluation = match_coco(truth, detections, kind, "pycocotools", max_detections)
    params = evaluation.params
    shape = len(params.catIds), len(params.areaRng), len(params.imgIds)
    found = np.empty(shape, dtype=object)
    for place, match in enumerate(evaluation.evalImgs):
        found.flat[place] = match
    return [[_joined(images) for images in sizes] for sizes in found]


def _joined(images: Sequence[dict | None]) -> ClassMatches:
    """The matches of one class and size in all images."""
    objects = np.zeros(len(images), np.int64)
    parts = []
    for position, match in enumerate(images):
        if match is None:
            continue
        objects[position] = np.count_nonzero(np.asarray(match["gtIgnore"]) == 0)
        scores = np.asarray(match["dtScores"], dtype=np.float64)
        own = np.full(len(scores), position)
        parts.append((scores, own, np.asarray(match["dtMatches"]) > 0, match["dtIgnore"]))
    if not parts:
        none = np.zeros((len(THRESHOLDS), 0), bool)
        return ClassMatches(np.zeros(0), np.zeros(0, np.int64), none, none, objects)
    scores, positions, hits, ignored = (
        np.concatenate([part[i] for part in parts], axis=-1) for i in range(4)
    )
    order = np.argsort(-scores, kind="mergesort")
    ignored = ignored[:, order].astype(bool)
    return ClassMatches(
        scores[order], positions[order], hits[:, order] & ~ignored, ignored, objects
    )


def weighted_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """COCO's AP as if every image were there as often as its weight says.

    Args:
        matches: of one class and size.
        weights: (D, I), D draws of the images.

    Returns:
        float64 (D, T) percent; nan for draws without an object.
    """
    counts = weights @ matches.objects
    result = np.full((len(weights), len(THRESHOLDS)), np.nan)
    for draw in np.flatnonzero(counts):
        recall, precision = _curve(matches, weights[draw][matches.images], counts[draw])
        # How many of the recalls are first reached at each detection.
        reached = np.searchsorted(RECALLS, recall.ravel(), side="right").reshape(recall.shape)
        steps = np.diff(reached, axis=1, prepend=0)
        result[draw] = 100 * (steps * precision).sum(axis=1) / len(RECALLS)
    return result


def _curve(matches: ClassMatches, weights: np.ndarray, count: int):
    """Recall, and the best precision at this or a higher one, after each detection: two (T, N)."""
    hits = np.cumsum(matches.hits * weights, axis=1, dtype=np.float64)
    alarms = np.cumsum(~(matches.hits | matches.ignored) * weights, axis=1, dtype=np.float64)
    precision = hits / (hits + alarms + _TINY)
    return hits / count, np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]


def precision_at_recalls(matches: ClassMatches, threshold: float) -> np.ndarray:
    """The precision-recall curve of one class.

    Args:
        matches: of the class, of objects of all sizes.
        threshold: of IoU, one of `THRESHOLDS`.

    Returns:
        (101,) precision at recall 0, 0.01, ..., 1, 0 where it is not reached; nan if there is no
        object.
    """
    count = matches.objects.sum()
    if not count:
        return np.full(len(RECALLS), np.nan)
    row = int(np.flatnonzero(np.isclose(THRESHOLDS, threshold))[0])
    recall, precision = _curve(matches, np.ones(len(matches.scores)), count)
    places = np.searchsorted(recall[row], RECALLS, side="left")
    return np.append(precision[row], 0.0)[np.minimum(places, len(matches.scores))]
