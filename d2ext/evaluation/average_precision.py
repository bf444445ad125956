"""Average precision of the PASCAL VOC kind from known overlaps: the core of mAP^r, in numpy.

A detection is compared with the one object of its image and class that it overlaps most; it is a
hit if that overlap reaches the threshold and no better-scored detection has claimed the object.
There is no second choice (Hariharan et al., ECCV 2014, and the evaluation code of MNC and FCIS).
"""

from typing import NamedTuple

import numpy as np

# The eleven points of VOC 2007 as numpy's arange gives them. Three of them are a little above 0.3,
# 0.6 and 0.7, so a recall of exactly 3/10 does not reach its point; published results were
# computed like this.
RECALL_POINTS = np.arange(0.0, 1.1, 0.1)
HIT, FALSE_ALARM, IGNORED = 1, 0, -1


class ClassDetections(NamedTuple):
    """All detections of one class, in any order; arrays of length N."""

    scores: np.ndarray  # float
    overlaps: np.ndarray  # float: IoU with the best object of the class; negative: there is none
    objects: np.ndarray  # int: number of that object, unique over all images
    crowd_cover: np.ndarray | None = None  # float: largest part inside one crowd region


def judge(detections: ClassDetections, threshold: float) -> np.ndarray:
    """What becomes of each detection of a class at one IoU threshold.

    Equal scores keep their order. A detection that is no hit, but of which at least `threshold`
    lies inside a crowd region, is ignored; data without crowd regions know no such thing.

    Args:
        detections: of one class.
        threshold: in (0, 1]; an overlap equal to it suffices.

    Returns:
        int8 (N,), by descending score: `HIT`, `FALSE_ALARM` or `IGNORED`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"an IoU threshold is in (0, 1], not {threshold}")
    order = np.argsort(-detections.scores, kind="stable")
    result = np.zeros(len(order), np.int8)
    close = np.flatnonzero(detections.overlaps[order] >= threshold)
    _, first = np.unique(detections.objects[order][close], return_index=True)
    result[close[first]] = HIT
    if detections.crowd_cover is not None:
        covered = detections.crowd_cover[order] >= threshold
        result[covered & (result != HIT)] = IGNORED
    return result


def recall_and_precision(hits: np.ndarray, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection.

    Args:
        hits: (N,) nonzero for a hit, by descending score.
        num_objects: number of objects to be found, positive.

    Returns:
        Two float64 arrays (N,).
    """
    found = np.cumsum(np.asarray(hits) != 0)
    return found / num_objects, found / np.arange(1, len(found) + 1)


def average_precision(hits: np.ndarray, num_objects: int, area: bool = False) -> float:
    """AP of one class at one threshold.

    Args:
        hits: (N,) nonzero for a hit, by descending score, without ignored detections.
        num_objects: number of objects to be found.
        area: the area under the monotone precision (VOC 2010 and later) instead of its mean at
            eleven points (VOC 2007), which mAP^r is defined with.

    Returns:
        In [0, 1]; nan if there is no object to be found.
    """
    if num_objects == 0:
        return float("nan")
    recall, precision = recall_and_precision(hits, num_objects)
    # The best precision at this or any higher recall; none is left beyond the last detection.
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if area:
        return float(np.sum(np.diff(recall, prepend=0.0) * envelope[:-1]))
    return float(envelope[np.searchsorted(recall, RECALL_POINTS, side="left")].mean())


def class_average_precision(
    detections: ClassDetections, num_objects: int, threshold: float, area: bool = False
) -> float:
    """AP of the detections of one class, see `judge` and `average_precision`."""
    verdicts = judge(detections, threshold)
    return average_precision(verdicts[verdicts != IGNORED] == HIT, num_objects, area)
