"""Numbers and the page of the demo: the table on the terminal, metrics.json and report.html."""

import json
import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from tabulate import tabulate
from walkthrough.models import Model
from walkthrough.training import TrainingResult

from d2ext.version import __version__

COLUMNS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")


class Outcome(NamedTuple):
    """Everything the report says about one network.

    Attributes:
        command: the training command, as it can be typed.
        weights: the trained weights.
        parameters: number of learnable values.
        pictures: predictions, one address per validation image.
        stages: COCO metrics after each stage, or None for a network without stages.
        stage_pictures: rows of addresses, one per stage.
    """

    model: Model
    command: str
    weights: Path
    parameters: int
    training: TrainingResult
    pictures: list[str]
    stages: list[dict[str, float]] | None = None
    stage_pictures: list[list[str]] | None = None


def number(value: Any) -> float:
    """A metric; 0 where nothing was found at all, which COCO evaluation calls nan."""
    return 0.0 if value is None or math.isnan(value) else round(float(value), 3)


def summary(outcome: Outcome) -> dict[str, float]:
    """What metrics.json holds for one network; APs in percent."""
    values = {column: number(outcome.training.metrics.get(column)) for column in COLUMNS}
    values["train_seconds"] = round(outcome.training.seconds, 1)
    values["parameters"] = outcome.parameters
    for index, stage in enumerate(outcome.stages or (), start=1):
        values.update({f"stage{index}/{c}": number(stage.get(c)) for c in COLUMNS})
    return values


def write_metrics(outcomes: list[Outcome], path: Path) -> None:
    metrics = {outcome.model.name: summary(outcome) for outcome in outcomes}
    path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def table(outcomes: list[Outcome]) -> str:
    """The table for the terminal."""
    rows = []
    for outcome in outcomes:
        s = summary(outcome)
        rows.append(
            [outcome.model.name, f"{s['parameters'] / 1e6:.2f} M", f"{s['train_seconds']:.0f}"]
            + [s["bbox/AP"], s["segm/AP"], s["segm/AP50"], s["segm/AP75"]]
        )
    headers = ["model", "parameters", "train s", "box AP", "mask AP", "mask AP50", "mask AP75"]
    return tabulate(rows, headers, floatfmt=".1f", disable_numparse=[1])


def class_table(outcomes: list[Outcome], names: list[str]) -> list[dict]:
    """Mask AP per class: name and one value per network, None where the class does not occur."""
    rows = []
    for name in names:
        found = [outcome.training.metrics.get(f"segm/AP-{name}") for outcome in outcomes]
        values = [None if v is None or math.isnan(v) else v for v in found]
        rows.append({"name": name, "values": values})
    return rows


def duration(seconds: float) -> str:
    """Such as `12 min 5 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def write_report(path: Path, outcomes: list[Outcome], **facts: Any) -> None:
    """Render report.html; `facts` are further variables of the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        duration=duration,
        words=lambda n: ("No", "One", "Two", "Three", "Four", "Five")[n] if n < 6 else str(n),
        millions=lambda n: f"{n / 1e6:.2f} M",
        ap=lambda value: "–" if value is None else f"{value:.1f}",
    )
    summaries = [summary(outcome) for outcome in outcomes]
    best = {column: max(s[column] for s in summaries) for column in COLUMNS}
    python = platform.python_version()
    page = environment.get_template("report.html.j2").render(
        rows=list(zip(outcomes, summaries)),
        best=best,
        training_seconds=sum(outcome.training.seconds for outcome in outcomes),
        versions=f"d2ext {__version__}, PyTorch {torch.__version__}, Python {python}",
        **facts,
    )
    path.write_text(page, encoding="utf-8")
