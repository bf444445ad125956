#!/usr/bin/env python
"""What `make demo` runs: trains tiny networks on the built-in data, evaluates them, uses them on
image files, and reports in a table, metrics.json and report.html."""

import argparse
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path

from PIL import Image
from walkthrough import machine, models, pictures, report
from walkthrough.training import ProgressLine, Training, clock, train_all

from d2ext.config import load_projects
from d2ext.data import get_dataset_records
from d2ext.engine import Predictor, build_experiment
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError
from d2ext.report import Entry, write_report
from d2ext.report.page import duration
from d2ext.report.sources import Source, load_truth, predicted_entry

from detectron2.data import MetadataCatalog

_NUM_PICTURES = 3  # in predictions.jpg; the report has all images


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/demo", help="(default: %(default)s)")
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"some of {', '.join(m.name for m in models.MODELS)} (default: all of them), "
        "or a config file of any installed project",
    )
    parser.add_argument("--max-iter", type=int, help="iterations per model (default: its config's)")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="[MODEL:]KEY=VALUE",
        help="config override, for all models or one (may be repeated)",
    )
    return parser


def training_command(model: models.Model, overrides) -> list:
    script, config = (str(models.ROOT / x) for x in (model.script, model.config))
    return [sys.executable, script, "--config-file", config, *overrides]


def typed(command) -> str:
    """A command as one types it in the repository: short paths, and `python`."""
    short = [str(x).removeprefix(f"{models.ROOT}{os.sep}") for x in command]
    return shlex.join(["python", *short[1:]])


def plan(model: models.Model, args) -> tuple:
    """What to train: the experiment of a model and its training."""
    folder = Path(args.output) / model.name
    overrides = models.overrides_for(model, args.override, args.models)
    if args.max_iter is not None:
        overrides.append(f"train.max_iter={args.max_iter}")
    experiment = build_experiment(str(models.ROOT / model.config), overrides)
    command = training_command(model, [*overrides, f"train.output_dir={folder}"])
    # Twice the usual number of lines, for smooth progress and curves.
    command.append("train.log_period=10")
    return experiment, Training(model.name, command, folder, experiment.max_iter)


def use(model: models.Model, planned: tuple, result, data: tuple) -> tuple:
    """Let a trained network predict on the test set: its entry in the report, and its pictures."""
    experiment, training = planned
    shown, records, truth = data
    weights = str(training.folder / "model_final.pth")
    source = Source(weights, model.title, weights, folder=str(training.folder))
    predictor = Predictor(experiment, weights=weights)
    line = ProgressLine(model.name)
    line.show(f"predicting on {len(records)} images")
    entry = predicted_entry(source, predictor, records, truth)
    line.close(f"predicted on {len(records)} images")
    entry = entry._replace(
        about=model.about,
        command=typed(training.command[:-1]),
        facts=[*entry.facts, ("trained in", duration(result.seconds))],
    )
    return entry, pictures.prediction_pictures(predictor, shown)


def to_outcome(model: models.Model, entry: Entry, result, stages) -> report.Outcome:
    """What metrics.json and the table say about a network."""
    by_stage = [{f"{kind}/{k}": v for kind, x in s.items() for k, v in x.items()} for s in stages]
    weights = Path(dict(entry.facts)["weights"])
    return report.Outcome(model, entry.command, weights, entry.parameters, result, by_stage)


def data_sets(chosen, args):
    """Names of the training and the test set, which have to be those of every model."""
    found = set()
    for model in chosen:
        overrides = models.overrides_for(model, args.override, args.models)
        experiment = build_experiment(str(models.ROOT / model.config), overrides)
        found.add((tuple(experiment.train_sets()), tuple(experiment.test_sets())))
    if len(found) != 1 or not all(len(names) == 1 for names in next(iter(found))):
        raise UserError("the models must train on one data set and be tested on one, all the same")
    ((train_set,), (test_set,)) = found.pop()
    return train_set, test_set


def run(args) -> None:
    begin = time.monotonic()
    load_projects()
    chosen = models.select(args.models)
    output = Path(args.output)
    train_set, test_set = data_sets(chosen, args)
    for model in chosen:
        models.make_fresh(output / model.name)
    for name in ("report.html", "metrics.json", "predictions.jpg"):
        (output / name).unlink(missing_ok=True)
    num_train, records = len(get_dataset_records(train_set)), get_dataset_records(test_set)
    print(f"{machine.describe()}")
    print(f"{train_set}: {num_train} images, {test_set}: {len(records)} images", flush=True)
    planned = {model.name: plan(model, args) for model in chosen}
    workers = min(len(chosen), machine.usable_cores())
    # The most expensive network, which stands last, goes first.
    start = time.monotonic()
    results = train_all([planned[model.name][1] for model in reversed(chosen)], workers)
    training_seconds = time.monotonic() - start
    shown = pictures.choose_records(records, _NUM_PICTURES)
    data = (shown, *load_truth(test_set))
    used = [use(m, planned[m.name], results[m.name], data) for m in chosen]

    metadata = MetadataCatalog.get(test_set)
    columns = {"ground truth": pictures.ground_truth_pictures(shown, metadata)}
    columns |= {m.title: drawn for m, (_, drawn) in zip(chosen, used)}
    overview = Image.fromarray(pictures.overview(columns))
    overview.save(output / "predictions.jpg", quality=90)
    entries = [entry for entry, _ in used]
    facts = report.Facts(
        train_set=train_set,
        num_train=num_train,
        test_set=test_set,
        num_test=len(records),
        sample_image=os.path.relpath(shown[0]["file_name"]),
        seconds=time.monotonic() - begin,
        training_seconds=training_seconds,
        workers=workers,
        machine=machine.describe(),
    )
    weights = [output / m.name / "model_final.pth" for m in chosen]
    print("writing the report", flush=True)
    measures = write_report(
        output / "report.html",
        entries,
        data[2],
        data[1],
        test_set,
        report.words(chosen, weights, facts),
        thing_colors=metadata.get("thing_colors"),
    )
    outcomes = [
        to_outcome(m, entry, results[m.name], own.stages)
        for m, entry, own in zip(chosen, entries, measures)
    ]
    report.write_metrics(outcomes, output / "metrics.json")
    print(f"\n{report.table(outcomes)}\n")
    print(f"pictures, curves and more: {output / 'report.html'}, {output / 'predictions.jpg'}")
    print(f"numbers: {output / 'metrics.json'}")
    print(f"total time {clock(time.monotonic() - begin)}")


def main(argv=None) -> int:
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    # A polite end reaches the training process too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run_guarded(lambda: run(args))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
