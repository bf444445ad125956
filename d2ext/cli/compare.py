"""Compare trained models, and saved predictions, on one data set: a page with numbers, charts and
pictures, in one file that needs no network."""

import argparse
import logging
import os
import warnings
from collections.abc import Sequence

from d2ext.config import load_projects
from d2ext.data import register_all
from d2ext.data.json_files import write_json
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError
from d2ext.evaluation import GroundTruth
from d2ext.evaluation.predictions import to_coco
from d2ext.report import Entry, Words, write_numbers, write_report
from d2ext.report.measures import kind_word, kinds_of
from d2ext.report.sources import (
    Source,
    build_source_predictor,
    choose_data,
    is_onnx,
    load_truth,
    parse_source,
    predicted_entry,
    saved_entry,
    unique_names,
)

from detectron2.data import MetadataCatalog

_EPILOG = """
A model is the folder of a training, a checkpoint, a config and a checkpoint with a comma between
them, a file that d2ext export wrote (.onnx), or a JSON file with the predictions of an evaluation
or of d2ext predict. NAME= in front gives it another name. Without --data and --register the test
set of the first model is taken.

examples:
  %(prog)s output/run1 output/run2
  %(prog)s output/run1 "with flip=output/run2" --data mydata --output output/compared
  %(prog)s htc_tiny,weights.pth results.json --register my=ann.json,images
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[NAME=]... , see below")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="with val.json or test.json, as d2ext split writes it; or the name of a registered "
        "set, such as shapes",
    )
    parser.add_argument("--images", metavar="FOLDER", help="of --data, where they are elsewhere")
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANN.json,IMAGES",
        help="COCO-format data set; compared on itself when there is no --data (may be repeated)",
    )
    parser.add_argument(
        "--output",
        default="output/compare",
        metavar="FOLDER",
        help="gets report.html, metrics.json and the predictions of the models, which this "
        "command takes again (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=500,
        metavar="N",
        help="images in the page at most, those in which the models differ most "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--no-stages", action="store_true", help="leave out the result after each stage of cascades"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the config's)")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="[NAME:]KEY=VALUE",
        help="config override, for all models or that of a name (may be repeated)",
    )
    parser.add_argument(
        "--rename-classes",
        action="store_true",
        help="the classes of the data are those of the models, under other names",
    )
    return parser


def overrides_of(source: Source, texts: Sequence[str], known: Sequence[str]) -> list[str]:
    """Of the `KEY=VALUE` and `NAME:KEY=VALUE` words, those that concern one model.

    Args:
        known: names of all models.
    """
    found = []
    for text in texts:
        key, equals, value = text.partition("=")
        name, colon, rest = key.rpartition(":")
        if not equals:
            raise UserError(f"--override {text}: write KEY=VALUE or NAME:KEY=VALUE")
        if colon and name not in known:
            raise UserError(f"--override {text}: there is no model '{name}'")
        if not colon or name == source.name:
            found.append(f"{rest}={value}")
    return found


def gather(
    sources: Sequence[Source], args: argparse.Namespace
) -> tuple[str, list[dict], GroundTruth, list[Entry]]:
    """The data set, its records and annotations, and what every model finds in it.

    Models are built one after the other, so that one at a time is in memory.
    """
    names = [source.name for source in sources]

    def build(source: Source):
        overrides = overrides_of(source, args.override, names)
        return build_source_predictor(source, overrides, args.device)

    first = next((s for s in sources if s.results is None and not is_onnx(s)), None)
    named = bool(args.data or args.register)
    predictor = build(first) if first is not None and not named else None
    name = choose_data(args.data, args.images, args.register, predictor)
    records, truth = load_truth(name)
    entries = []
    for source in sources:
        if source.results is not None:
            entries.append(saved_entry(source, name, records, truth))
            continue
        if predictor is None or source is not first:
            predictor = build(source)
        entries.append(
            predicted_entry(
                source, predictor, records, truth, not args.no_stages, args.rename_classes
            )
        )
        predictor = None
    return name, records, truth, entries


def save_predictions(
    folder: str, sources: Sequence[Source], entries: Sequence[Entry], truth: GroundTruth
) -> None:
    """Write what models found as COCO results, one file each, for a later comparison."""
    for source, entry in zip(sources, entries):
        if source.results is None:
            found = [
                result
                for own in entry.detections
                if own is not None
                for result in to_coco(own, own.image_id, truth.category_ids, text=True)
            ]
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in entry.name)
            write_json(found, os.path.join(folder, "predictions", f"{name}.json"))


def run(args: argparse.Namespace) -> None:
    if args.pictures < 0:
        raise UserError("--pictures must not be negative")
    if args.images and not args.data:
        raise UserError("--images is for --data; with --register the folder is part of it")
    load_projects()
    register_all()
    sources = unique_names([parse_source(text) for text in args.models])
    name, records, truth, entries = gather(sources, args)
    page = os.path.join(args.output, "report.html")
    colors = MetadataCatalog.get(name).get("thing_colors")
    measures = write_report(page, entries, truth, records, name, Words(), args.pictures, colors)
    write_numbers(os.path.join(args.output, "metrics.json"), entries, measures)
    save_predictions(args.output, sources, entries, truth)
    kind = kinds_of(entries)[0]
    for entry, own in zip(entries, measures):
        value = own.tables[kind].total["AP"]
        text = f"{kind_word(kind)} AP {value.value:.1f} ({value.low:.1f} to {value.high:.1f})"
        print(f"{entry.name}: {text}")
    print(f"{len(truth.images)} images of {name}; open {page}")


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 for a mistake of the user."""
    args = argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    return run_guarded(lambda: run(args))
