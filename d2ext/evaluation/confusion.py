"""Which class is taken for which, and how good the result is in each image, at one score."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from d2ext.evaluation.error_types import FOREGROUND, image_overlaps
from d2ext.evaluation.ground_truth import GroundTruth
from d2ext.evaluation.predictions import ImageDetections


class Confusion(NamedTuple):
    """Counts at one score; K classes, I images in the order of the ground truth."""

    table: np.ndarray  # int (K + 1, K + 1), [true, found]; the last row: nothing there, the last
    # column: not found
    quality: np.ndarray  # (I,) in [0, 1], see `confusion`; nan: nothing there and nothing found


def confusion(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    with_masks: bool,
    score: float = 0.5,
) -> Confusion:
    """Pair detections with objects of any class, the best score first, at an IoU of 0.5.

    The quality of an image is the panoptic quality (Kirillov et al., CVPR 2019) of its objects of
    all classes: the sum of the IoU of hits over hits + half of the false alarms + half of the
    misses. A pair of different classes is a false alarm and a miss.

    Args:
        truth: annotations.
        detections: by image of `truth`; None: nothing was found there.
        with_masks: compare masks, else boxes.
        score: lowest one that counts, of the masks where they have their own.
    """
    size = len(truth.class_names)
    table = np.zeros((size + 1, size + 1), np.int64)
    quality = np.full(len(truth.images), np.nan)
    for index, (image, own) in enumerate(zip(truth.images, detections)):
        labels = np.array([a["label"] for a in image.annotations if not a["iscrowd"]], np.int64)
        classes, iou = np.zeros(0, np.int64), np.zeros((0, len(labels)))
        if own is not None:
            order, labels, iou, in_crowd = image_overlaps(image, truth, own, with_masks)
            kept = (own.scores_of(with_masks)[order] >= score) & ~(
                in_crowd & (iou.max(axis=1, initial=0) < FOREGROUND)
            )
            classes, iou = own.classes[order][kept], iou[kept]
        quality[index] = _pair(classes, labels, iou, table)
    return Confusion(table, quality)


def _pair(classes, labels, iou, table: np.ndarray) -> float:
    """Count the pairs of one image in the table; its quality."""
    left = iou.copy()
    total, hits = 0.0, 0
    taken = np.zeros(len(labels), bool)
    for i, label in enumerate(classes.tolist()):
        # Of several objects that fit, one of its own class is taken first.
        wish = left[i] + (left[i] >= FOREGROUND) * (labels == label)
        best = int(wish.argmax()) if len(labels) else -1
        if best < 0 or left[i, best] < FOREGROUND:
            table[-1, label] += 1
            continue
        table[labels[best], label] += 1
        taken[best] = True
        if labels[best] == label:
            total, hits = total + iou[i, best], hits + 1
        left[:, best] = 0
    np.add.at(table[:, -1], labels[~taken], 1)
    count = hits + (len(classes) - hits) / 2 + (len(labels) - hits) / 2
    return total / count if count else float("nan")
