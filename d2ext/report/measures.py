"""All numbers of a comparison."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from d2ext.evaluation import GroundTruth
from d2ext.evaluation.bootstrap import mean_of_known, percentile_interval, random_weights
from d2ext.evaluation.calibration import Calibration, calibration
from d2ext.evaluation.confusion import Confusion, confusion
from d2ext.evaluation.error_types import ErrorTypes, error_types
from d2ext.evaluation.matches import SIZES, coco_matches, precision_at_recalls, weighted_ap
from d2ext.report.entry import Detections, Entry

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CURVES = (0.5, 0.75)  # IoU of the precision-recall curves
_SINGLE = {"AP50": 0, "AP75": 5}  # positions among the thresholds
_KINDS = {"segm": "mask", "bbox": "box"}


class Value(NamedTuple):
    """Percent, with the 95% interval of other test images; nan: there is nothing to be found."""

    value: float
    low: float
    high: float


class Table(NamedTuple):
    """AP of one model and kind, by the names of `METRICS`."""

    total: dict[str, Value]
    classes: list[dict[str, Value]]
    draws: np.ndarray  # (D,) AP of draws of the images


class Measures(NamedTuple):
    """Everything that is measured of one model; K classes."""

    tables: dict[str, Table]  # by kind: "segm" and "bbox", or "bbox" only
    stages: list[dict[str, dict[str, float]]]  # kind -> metric -> percent, after each stage
    curves: dict[float, np.ndarray]  # IoU -> (K, 101) precision, of the main kind
    calibration: Calibration
    errors: ErrorTypes
    confusion: Confusion


def kinds_of(entries: Sequence[Entry]) -> tuple[str, ...]:
    """What can be compared: masks, where all models have them, and boxes; the main kind first."""
    return ("segm", "bbox") if all(entry.has_masks() for entry in entries) else ("bbox",)


def kind_word(kind: str) -> str:
    """`mask` or `box`."""
    return _KINDS[kind]


def measure(entries: Sequence[Entry], truth: GroundTruth, score: float = 0.5) -> list[Measures]:
    """Measure models on the same images, with the same draws of them.

    Args:
        entries: the models.
        truth: annotations of the images.
        score: lowest one that counts for confusion and the quality of images.
    """
    kinds = kinds_of(entries)
    weights = random_weights(len(truth.images))
    steps = sum(len(kinds) * (1 + len(entry.stages)) + 2 for entry in entries)
    with tqdm(total=steps, desc="measuring", disable=None, leave=False) as progress:
        return [_measure(entry, truth, kinds, weights, score, progress) for entry in entries]


def _measure(entry: Entry, truth: GroundTruth, kinds, weights, score, progress) -> Measures:
    tables, by_class = {}, {}
    for kind in kinds:
        matches = coco_matches(truth, entry.detections, kind)
        by_class[kind] = [sizes[0] for sizes in matches]
        tables[kind] = _table(matches, weights)
        progress.update()
    stages = []
    for detections in entry.stages:
        values = {}
        for kind in kinds:
            values[kind] = _plain(truth, detections, kind)
            progress.update()
        stages.append(values)
    with_masks = kinds[0] == "segm"
    errors = error_types(truth, entry.detections, with_masks)
    progress.update()
    table = confusion(truth, entry.detections, with_masks, score)
    progress.update()
    main = by_class[kinds[0]]
    curves = {iou: np.stack([precision_at_recalls(m, iou) for m in main]) for iou in CURVES}
    return Measures(tables, stages, curves, calibration(main), errors, table)


def _metrics(values: np.ndarray) -> dict[str, np.ndarray]:
    """By name: (..., sizes, T) AP of all sizes and thresholds -> (...)."""
    found = {"AP": values[..., 0, :].mean(axis=-1)}
    found |= {name: values[..., 0, row] for name, row in _SINGLE.items()}
    return found | {f"AP{size}": values[..., i, :].mean(-1) for i, size in enumerate(SIZES) if i}


def _table(matches, weights: np.ndarray) -> Table:
    """Values and intervals from matches by class and size."""
    once = np.ones((1, weights.shape[1]), np.int64)
    # (1 + D draws, classes, sizes, thresholds); the first one is the images themselves.
    stacked = np.concatenate([once, weights])
    values = np.stack(
        [np.stack([weighted_ap(m, stacked) for m in sizes], axis=1) for sizes in matches], axis=1
    )
    by_metric = _metrics(values)
    total = {name: mean_of_known(found) for name, found in by_metric.items()}
    classes = [
        {name: _value(found[:, label]) for name, found in by_metric.items()}
        for label in range(len(matches))
    ]
    return Table({name: _value(x) for name, x in total.items()}, classes, total["AP"][1:])


def _value(values: np.ndarray) -> Value:
    return Value(float(values[0]), *percentile_interval(values[1:]))


def _plain(truth: GroundTruth, detections: Detections, kind: str) -> dict[str, float]:
    """Metrics without intervals."""
    once = np.ones((1, len(truth.images)), np.int64)
    matches = coco_matches(truth, detections, kind)
    values = [np.stack([weighted_ap(m, once)[0] for m in sizes]) for sizes in matches]
    found = _metrics(np.stack(values))
    return {name: float(mean_of_known(x)) for name, x in found.items()}


def difference(first: Table, second: Table) -> Value:
    """How much more AP the first model has, with the interval of the same draws for both."""
    value = first.total["AP"].value - second.total["AP"].value
    return Value(value, *percentile_interval(first.draws - second.draws))


def as_numbers(entries: Sequence[Entry], measures: Sequence[Measures]) -> dict[str, Any]:
    """What `metrics.json` of a comparison holds; no value where there is nothing to be found."""
    written: dict[str, Any] = {}
    for entry, own in zip(entries, measures):
        values: dict[str, Any] = {}
        for kind, table in own.tables.items():
            for name, found in table.total.items():
                values[f"{kind}/{name}"] = _rounded(found.value)
            values[f"{kind}/AP interval"] = [_rounded(x) for x in table.total["AP"][1:]]
        for number, stage in enumerate(own.stages, start=1):
            for kind, found in stage.items():
                values |= {f"stage{number}/{kind}/{k}": _rounded(v) for k, v in found.items()}
        values |= {f"error/{k}": _rounded(v) for k, v in own.errors.gains.items()}
        values["calibration error"] = _rounded(own.calibration.error)
        if entry.parameters is not None:
            values["parameters"] = entry.parameters
        if entry.speed is not None:
            values["seconds per image"] = _rounded(entry.speed.seconds)
            values["peak memory"] = entry.speed.memory
        written[entry.name] = values
    return written


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
