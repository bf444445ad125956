"""What kinds of mistakes cost how much AP: the error types of TIDE.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020. Each
false positive and each missed object has one type; its weight is what AP50 would gain if all
mistakes of this type were mended (section 2.3). The authors' package `tidecv` requires
opencv-python, which shares its files with opencv-python-headless, so it is not installed; the tests
compare with numbers that it gave.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU: found; has something to do with an object
MOST_DETECTIONS = 100  # of an image
# In the order of the paper; what is wrong: class, place, both, twice, nothing there, not found.
TYPES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
SPECIAL = ("FalsePos", "FalseNeg")


class ErrorTypes(NamedTuple):
    """Mistakes of one model at an IoU of 0.5."""

    ap50: float  # percent, of the paper's kind: 100 detections of an image count, of all classes
    gains: dict[str, float]  # type -> percent of AP50 that mending it would gain
    counts: dict[str, int]  # of `TYPES`


class _Found(NamedTuple):
    """What counts for AP: scores and verdicts of detections by class, and numbers of objects."""

    points: dict[int, list[tuple[float, bool]]]
    objects: dict[int, int]


class _Mistake(NamedTuple):
    """A false positive, or for `Miss` an object of the class."""

    type: str
    label: int
    score: float = 0.0
    counted: bool = True  # False in a crowd region
    mended: int | None = None  # the class for which it would be a hit; None: it would be gone


def image_overlaps(image: TruthImage, truth: GroundTruth, found: ImageDetections, with_masks: bool):
    """IoU (N, M) of detections by descending score and objects, and what lies in crowd regions.

    Args:
        image: of `truth`.
        found: detections in it; the best 100 count.
        with_masks: masks, else boxes.

    Returns:
        order of the N detections, labels of the M objects, IoU, and bool (N,): mostly inside a
        crowd region of its class.
    """
    scores = found.scores_of(with_masks)
    order = np.argsort(-scores, kind="stable")[:MOST_DETECTIONS]
    if with_masks:
        regions = [found.rles()[i] for i in order]
    else:
        boxes = found.boxes[order].astype(np.float64)
        regions = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    overlaps = {}
    for crowd in (0, 1):
        chosen = [a for a in image.annotations if a["iscrowd"] == crowd]
        shapes = [truth.rle(image, a) if with_masks else list(a["bbox"]) for a in chosen]
        labels = np.array([a["label"] for a in chosen], dtype=np.int64)
        iou = np.zeros((len(order), len(chosen)))
        if len(order) and chosen:
            given = shapes if with_masks else np.asarray(shapes, dtype=np.float64)
            iou = np.asarray(mask_util.iou(regions, given, [crowd] * len(chosen)))
        overlaps[crowd] = labels, iou
    (labels, iou), (crowd_labels, cover) = overlaps[0], overlaps[1]
    same = found.classes[order][:, None] == crowd_labels[None]
    return order, labels, iou, ((cover > FOREGROUND) & same).any(axis=1)


def error_types(
    truth: GroundTruth, detections: Sequence[ImageDetections | None], with_masks: bool
) -> ErrorTypes:
    """The mistakes of a model.

    Args:
        truth: annotations.
        detections: by image of `truth`; None: nothing was found there.
        with_masks: compare masks, else boxes.
    """
    found = _Found(defaultdict(list), defaultdict(int))
    mistakes, missed = [], defaultdict(int)
    for image, own in zip(truth.images, detections):
        _judge_image(image, truth, own, with_masks, found, mistakes, missed)
    base = _ap50(_mended(found, mistakes, None))
    gains = {name: max(_ap50(_mended(found, mistakes, name)) - base, 0.0) for name in TYPES}
    plain = _mended(found, mistakes, None)
    # Without any false positive, and without any object that was not found.
    perfect = {k: [(float(hit), hit) for _, hit in points] for k, points in plain.points.items()}
    gains["FalsePos"] = _ap50(plain._replace(points=perfect)) - base
    left = {label: count - missed[label] for label, count in plain.objects.items()}
    gains["FalseNeg"] = _ap50(plain._replace(objects=left)) - base
    counts = {name: sum(m.type == name for m in mistakes) for name in TYPES}
    return ErrorTypes(base, gains, counts)


def _judge_image(image, truth, own, with_masks, found, mistakes, missed) -> None:
    """Add hits, mistakes and missed objects of one image to the lists of all."""
    if own is None:
        labels = np.array([a["label"] for a in image.annotations if not a["iscrowd"]], np.int64)
        order, iou, in_crowd = np.zeros(0, np.int64), np.zeros((0, len(labels))), np.zeros(0, bool)
        classes, scores = order, np.zeros(0)
    else:
        order, labels, iou, in_crowd = image_overlaps(image, truth, own, with_masks)
        classes, scores = own.classes[order], own.scores_of(with_masks)[order].astype(np.float64)
    for label in labels.tolist():
        found.objects[label] += 1
    same = classes[:, None] == labels[None]
    owner = _claim(np.where(same, iou, 0.0))
    taken = np.zeros(len(labels), bool)
    taken[owner[owner >= 0]] = True
    wishes: dict[int, list[tuple[float, int]]] = defaultdict(list)  # object -> who could have it
    own_mistakes = []
    for i, label in enumerate(classes.tolist()):
        if owner[i] >= 0:
            found.points[label].append((scores[i], True))
            continue
        name, target = _type_of(iou[i], same[i], taken)
        if target is not None and not taken[target]:
            wishes[target].append((scores[i], len(own_mistakes)))
        own_mistakes.append(_Mistake(name, label, scores[i], not in_crowd[i]))
    for target, rivals in wishes.items():
        place = max(rivals, key=lambda rival: rival[0])[1]  # the first of equal ones
        own_mistakes[place] = own_mistakes[place]._replace(mended=int(labels[target]))
    mistakes += own_mistakes
    for target in np.flatnonzero(~taken).tolist():
        missed[int(labels[target])] += 1
        if target not in wishes:
            mistakes.append(_Mistake("Miss", int(labels[target])))


def _claim(iou: np.ndarray) -> np.ndarray:
    """The object (N,) that each detection gets, -1 for none; the best score chooses first."""
    iou = iou.copy()
    owner = np.full(len(iou), -1)
    for i in range(len(iou) if iou.shape[1] else 0):
        best = int(iou[i].argmax())
        if iou[i, best] >= FOREGROUND:
            owner[i] = best
            iou[:, best] = 0
    return owner


def _type_of(iou: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[str, int | None]:
    """Type of a false positive, and the object that it would have if it were mended."""
    if not len(iou):
        return "Bkg", None
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    if BACKGROUND <= own.max() <= FOREGROUND:
        return "Loc", int(own.argmax())
    if other.max() >= FOREGROUND:
        return "Cls", int(other.argmax())
    if np.where(taken, own, 0.0).max() >= FOREGROUND:
        return "Dupe", None
    return ("Bkg" if iou.max() <= BACKGROUND else "Both"), None


def _mended(found: _Found, mistakes: Sequence[_Mistake], name: str | None) -> _Found:
    """All detections, with the mistakes of one type mended."""
    points = defaultdict(list, {label: list(own) for label, own in found.points.items()})
    objects = dict(found.objects)
    for mistake in mistakes:
        if mistake.type == "Miss":
            objects[mistake.label] -= mistake.type == name
        elif mistake.type != name:
            if mistake.counted:
                points[mistake.label].append((mistake.score, False))
        elif mistake.mended is not None:
            points[mistake.mended].append((mistake.score, True))
    return _Found(points, objects)


def _ap50(found: _Found) -> float:
    """Mean over the classes that have objects, or detections of objects, of AP in percent."""
    values = []
    for label, count in found.objects.items():
        points = found.points.get(label, [])
        if count or points:
            values.append(_class_ap(points, count))
    return 100 * float(np.mean(values)) if values else float("nan")


def _class_ap(points: list[tuple[float, bool]], count: int) -> float:
    """Mean precision at 101 recalls."""
    if not count or not points:
        return 0.0
    scores, verdicts = np.array(points, dtype=np.float64).T
    hits = np.cumsum(verdicts[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    places = np.searchsorted(hits / count, np.arange(101) / 100, side="left")
    return float(envelope[places].mean())
