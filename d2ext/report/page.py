"""The page: one HTML file with styles, pictures, numbers and script inside."""

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch

from d2ext.data.json_files import write_json
from d2ext.errors import UserError
from d2ext.evaluation import GroundTruth
from d2ext.report import charts
from d2ext.report.entry import Entry
from d2ext.report.measures import (
    METRICS,
    Measures,
    Table,
    as_numbers,
    difference,
    kind_word,
    kinds_of,
    measure,
)
from d2ext.report.pictures import Gallery, build_gallery
from d2ext.version import __version__

TEMPLATE = Path(__file__).resolve().parent / "template"
MOST_CLASSES = 12  # of a confusion table; more are told as a list
MOST_CURVES = 40  # classes with curves of their own
MOST_CONFUSIONS = 20
ERROR_MEANINGS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, wrong place",
    "Both": "wrong in both",
    "Dupe": "found a second time",
    "Bkg": "nothing is there",
    "Miss": "not found",
    "FalsePos": "all false positives",
    "FalseNeg": "all that was not found",
}


class Words(NamedTuple):
    """What the page says beside the numbers.

    Attributes:
        title: its heading.
        lead: one paragraph below the heading.
        tiles: (value, what it is) beside those of every comparison.
        steps: (what to do next, command).
        footer: facts such as the machine.
    """

    title: str = ""
    lead: str = ""
    tiles: Sequence[tuple[str, str]] = ()
    steps: Sequence[tuple[str, str]] = ()
    footer: Sequence[str] = ()


def duration(seconds: float) -> str:
    """Such as `12 min 5 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def percent_text(value: float | None) -> str:
    """One decimal; a dash where there is no value."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def write_report(
    path: str | os.PathLike,
    entries: Sequence[Entry],
    truth: GroundTruth,
    records: Sequence[dict],
    dataset: str,
    words: Words | None = None,
    most: int = 500,
    thing_colors: Sequence | None = None,
) -> list[Measures]:
    """Compare models and write the page, and the numbers beside it as `metrics.json`.

    Args:
        path: of the HTML file.
        entries: the models, at least one, with unique names.
        truth, records: of the data set, images in the same order.
        dataset: its name.
        words: what the page says; default: what the data tell.
        most: number of images in the page at most.
        thing_colors: RGB in 0..255 of every class; default: as predictions are drawn.

    Returns:
        What was measured of each model.

    Raises:
        UserError: the file cannot be written, or an image cannot be read.
    """
    measures = measure(entries, truth)
    quality = np.stack([own.confusion.quality for own in measures])
    gallery = build_gallery(entries, truth, records, quality, most, thing_colors)
    page = render(entries, measures, truth, dataset, gallery, words or Words())
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return measures


def write_numbers(path: str, entries: Sequence[Entry], measures: Sequence[Measures]) -> None:
    """Write what was measured as a JSON file."""
    write_json(as_numbers(entries, measures), path)


def render(
    entries: Sequence[Entry],
    measures: Sequence[Measures],
    truth: GroundTruth,
    dataset: str,
    gallery: Gallery,
    words: Words,
) -> str:
    """The text of the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        duration=duration,
        pct=percent_text,
        millions=lambda n: f"{n / 1e6:.2f} M",
        mebibytes=lambda n: f"{n / 2**20:.0f} MiB",
        milliseconds=lambda s: f"{1000 * s:.0f} ms" if s < 10 else f"{s:.0f} s",
    )
    kinds = kinds_of(entries)
    python = platform.python_version()
    return environment.get_template("report.html.j2").render(
        words=words._replace(title=words.title or _title(entries, dataset)),
        dataset=dataset,
        rows=[_row(*x) for x in zip(entries, measures, charts.legend([e.name for e in entries]))],
        kinds=kinds,
        kind_word=kind_word,
        metrics=METRICS,
        best=_best(measures, kinds),
        differences=_differences(measures, kinds[0]),
        num_images=len(truth.images),
        num_objects=sum(not a["iscrowd"] for i in truth.images for a in i.annotations),
        classes=_class_rows(measures, truth, kinds[0]),
        curves=_curves(measures, truth),
        calibration_chart=charts.reliability_chart([own.calibration for own in measures]),
        learning=charts.learning_charts([e.curve for e in entries], kinds[0]),
        error_chart=charts.error_chart([own.errors.gains for own in measures]),
        error_meanings=ERROR_MEANINGS,
        confusions=[_confusions(own, truth.class_names) for own in measures],
        gallery=gallery,
        versions=f"d2ext {__version__}, PyTorch {torch.__version__}, Python {python}",
    )


def _title(entries: Sequence[Entry], dataset: str) -> str:
    count = len(entries)
    return f"{count} model{'' if count == 1 else 's'} on {dataset}"


def _row(entry: Entry, own: Measures, legend: tuple[str, str]) -> dict[str, Any]:
    return {"entry": entry, "measures": own, "color": legend[1]}


def _best(measures: Sequence[Measures], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """The highest value of each metric, where there are several models."""
    found: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for kind in kinds:
        for name in METRICS:
            values = [own.tables[kind].total[name].value for own in measures]
            known = [v for v in values if not math.isnan(v)]
            found[kind][name] = max(known) if known and len(values) > 1 else math.inf
    return found


def _differences(measures: Sequence[Measures], kind: str) -> list:
    """To the model with the highest AP; None for that one, and where there is no AP."""
    tables: list[Table] = [own.tables[kind] for own in measures]
    values = [table.total["AP"].value for table in tables]
    if len(tables) < 2 or any(math.isnan(v) for v in values):
        return [None] * len(tables)
    best = tables[int(np.argmax(values))]
    return [None if table is best else difference(table, best) for table in tables]


def _class_rows(measures: Sequence[Measures], truth: GroundTruth, kind: str) -> list[dict]:
    counts = np.zeros(len(truth.class_names), np.int64)
    for image in truth.images:
        for annotation in image.annotations:
            counts[annotation["label"]] += not annotation["iscrowd"]
    return [
        {
            "name": name,
            "count": int(counts[label]),
            "values": [own.tables[kind].classes[label] for own in measures],
        }
        for label, name in enumerate(truth.class_names)
    ]


def _curves(measures: Sequence[Measures], truth: GroundTruth) -> list[dict]:
    """Precision-recall charts: of all classes at two thresholds, then of the largest classes."""
    found: list[dict[str, Any]] = []
    for iou in measures[0].curves:
        mean = [np.nan_to_num(_column_mean(own.curves[iou])) for own in measures]
        chart = charts.precision_recall_chart(mean)
        found.append({"label": None, "title": f"all classes, IoU {iou:g}", "chart": chart})
    iou = min(measures[0].curves)
    rows = _class_rows(measures, truth, next(iter(measures[0].tables)))
    shown = sorted(range(len(rows)), key=lambda label: -rows[label]["count"])[:MOST_CURVES]
    for label in sorted(shown):
        if rows[label]["count"]:
            chart = charts.precision_recall_chart([own.curves[iou][label] for own in measures])
            title = f"{rows[label]['name']}, IoU {iou:g}"
            found.append({"label": label, "title": title, "chart": chart})
    return found


def _column_mean(curves: np.ndarray) -> np.ndarray:
    """Mean over the classes that have objects."""
    known = curves[~np.isnan(curves[:, 0])]
    return known.mean(axis=0) if len(known) else np.full(curves.shape[1], np.nan)


def _confusions(own: Measures, names: Sequence[str]) -> dict[str, Any]:
    """A table for few classes, and the most frequent mix-ups."""
    table = own.confusion.table
    size = len(names)
    pairs = [
        (int(table[true, found]), names[true], names[found])
        for true in range(size)
        for found in range(size)
        if true != found and table[true, found]
    ]
    rows = []
    if size <= MOST_CLASSES:
        for true, name in enumerate([*names, "nothing there"]):
            total = max(int(table[true].sum()), 1)
            cells = [(int(n), float(n) / total) for n in table[true]]
            rows.append({"name": name, "cells": cells})
    return {
        "heads": [*names, "not found"],
        "rows": rows,
        "pairs": sorted(pairs, key=lambda pair: -pair[0])[:MOST_CONFUSIONS],
        "missed": int(table[:-1, -1].sum()),
        "alarms": int(table[-1].sum()),
    }
