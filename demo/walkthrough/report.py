"""Numbers and words of the demo: the table on the terminal, metrics.json, and what the report says
beside what every comparison does."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate
from walkthrough.models import Model
from walkthrough.training import TrainingResult

from d2ext.report import Words
from d2ext.report.page import duration

COLUMNS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five")


class Outcome(NamedTuple):
    """What the demo knows about one network.

    Attributes:
        command: the training command, as it can be typed.
        weights: the trained weights.
        parameters: number of learnable values.
        stages: COCO metrics after each stage; empty for a network without stages.
    """

    model: Model
    command: str
    weights: Path
    parameters: int
    training: TrainingResult
    stages: Sequence[dict[str, float]] = ()


class Facts(NamedTuple):
    """What is true of the whole demo; times in seconds.

    Attributes:
        train_set, num_train, test_set, num_test: names of the data sets, numbers of images.
        sample_image: path of an image file of the test set.
        seconds: from the start to the report.
        training_seconds: of it, while networks were trained.
        workers: how many were trained at a time.
        machine: in one line.
    """

    train_set: str
    num_train: int
    test_set: str
    num_test: int
    sample_image: str
    seconds: float
    training_seconds: float
    workers: int
    machine: str


def number(value: Any) -> float:
    """A metric; 0 where nothing was found at all, which COCO evaluation calls nan."""
    return 0.0 if value is None or math.isnan(value) else round(float(value), 3)


def summary(outcome: Outcome) -> dict[str, float]:
    """What metrics.json holds for one network; APs in percent."""
    values = {column: number(outcome.training.metrics.get(column)) for column in COLUMNS}
    values["train_seconds"] = round(outcome.training.seconds, 1)
    values["parameters"] = outcome.parameters
    for index, stage in enumerate(outcome.stages, start=1):
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


def words(models: Sequence[Model], weights: Sequence[Path], facts: Facts) -> Words:
    """Heading, times and next steps of the report.

    Args:
        models, weights: of every network, in the same order.
        facts: of the demo.
    """
    count = len(models)
    name = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    total = duration(facts.seconds)
    seen = "that it had never seen" if facts.train_set != facts.test_set else ", the same ones"
    at_a_time = f", {facts.workers} networks at a time" if facts.workers > 1 else ""
    last, path = models[-1], weights[-1]
    train = f"python {last.script} --config-file {last.config}"
    return Words(
        title=f"{name} network{'' if count == 1 else 's'}, trained and tested on this machine in "
        f"{total}",
        lead=f"Each network learned from {facts.num_train} images of {facts.train_set} to find "
        "every object, name it, and mark the pixels that belong to it. Then it was tested on "
        f"{facts.num_test} images of {facts.test_set} {seen}. These are small versions of the "
        "published networks, trained for minutes; they show that everything works, not how good "
        "the full networks are.",
        tiles=[
            (total, f"in total, of which {duration(facts.training_seconds)} training{at_a_time}")
        ],
        steps=[
            (
                "Use a trained network on your images",
                f"d2ext predict --weights {path} --input {facts.sample_image} "
                "--output output/pictures",
            ),
            ("Compare networks again", f"d2ext compare {' '.join(str(p.parent) for p in weights)}"),
            (
                "Train longer, on the larger set",
                f"{train} DATASETS.TRAIN=shapes_big_train DATASETS.TEST=shapes_big_val "
                "train.max_iter=6000 train.output_dir=output/longer",
            ),
            (
                "Train on your own data in COCO format",
                f"{train} --register mine=annotations.json,images DATASETS.TRAIN=mine "
                "DATASETS.TEST=mine train.output_dir=output/mine",
            ),
        ],
        footer=[facts.machine, f"{total} in total"],
    )
