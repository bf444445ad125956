"""Evaluate the result after each stage of a multi-stage model such as HTC: how much does every
stage add? Works with every config whose model has `inference_stages`."""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import warnings

import torch
from tabulate import tabulate
from tqdm import tqdm

from d2ext.checkpoint import read_metadata
from d2ext.config import find_config, load_projects
from d2ext.engine import Predictor, build_experiment
from d2ext.engine.cli import add_rename_option, run_guarded
from d2ext.engine.provenance import check_classes
from d2ext.errors import UserError
from d2ext.evaluation import build_evaluator

_COLUMNS = [f"{task}/{metric}" for task in ("bbox", "segm") for metric in ("AP", "AP50", "AP75")]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help=".yaml or .py config, or the name of a shipped one",
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: the config's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the config's)")
    parser.add_argument("--output", metavar="FILE.json", help="write the numbers here too")
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANN.json,IMAGES",
        help="a data set to evaluate on or that the config names (may be repeated)",
    )
    add_rename_option(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser


@torch.no_grad()
def evaluate_stages(model, loader, dataset_name: str) -> list[dict[str, float]]:
    """COCO metrics of the results after each stage.

    Args:
        model: in evaluation mode, with `inference_stages(batched_inputs)`.
        loader: batches of the data set.
        dataset_name: its registered name.

    Returns:
        One `{"bbox/AP": ..., "segm/AP50": ..., ...}` per stage, in percent; an AP is 0 when
        nothing was found.
    """
    evaluators = []
    for inputs in tqdm(loader, desc=dataset_name, unit="img", disable=None, leave=False):
        stages = model.inference_stages(inputs)
        if not evaluators:
            evaluators = [build_evaluator(dataset_name) for _ in stages]
            for evaluator in evaluators:
                evaluator.reset()
        for evaluator, outputs in zip(evaluators, stages):
            evaluator.process(inputs, outputs)
    results = []
    for evaluator in evaluators:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its own tables
            found = evaluator.evaluate()
        results.append(
            {f"{task}/{name}": value for task, x in found.items() for name, value in x.items()}
        )
    return _without_gaps(results)


def _without_gaps(results: list[dict[str, float]]) -> list[dict[str, float]]:
    """A stage that found nothing has no mask metrics and nan for boxes: both mean 0."""
    names = sorted({name for result in results for name in result if name in _COLUMNS})
    for result in results:
        for name in names:
            if math.isnan(result.get(name, math.nan)):
                result[name] = 0.0
    return results


def run(args) -> None:
    load_projects()
    args.config_file = find_config(args.config_file)
    experiment = build_experiment(args.config_file, args.opts, args.register, eval_only=True)
    experiment.rename_classes = args.rename_classes
    if not experiment.test_sets():
        raise UserError(f"{args.config_file} has no test set; set DATASETS.TEST=NAME")
    weights = args.weights or experiment.init_checkpoint
    check_classes(experiment, read_metadata(weights), weights)
    predictor = Predictor(experiment, weights=args.weights, device=args.device)
    if not hasattr(predictor.model, "inference_stages"):
        raise UserError(
            f"{type(predictor.model).__name__} of {args.config_file} has no results per stage; "
            "use this tool with a multi-stage model such as HTC"
        )
    written = {}
    for name in experiment.test_sets():
        loader = experiment.build_test_loader(name)
        written[name] = evaluate_stages(predictor.model, loader, name)
        rows = [
            [number, *(stage.get(c) for c in _COLUMNS)]
            for number, stage in enumerate(written[name], start=1)
        ]
        print(f"{name}, after stage")
        print(tabulate(rows, headers=["stage", *_COLUMNS], floatfmt=".1f", missingval="-"))
    if args.output:
        _write(args.output, written)


def _write(path: str, results: dict[str, list[dict[str, float]]]) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            json.dump(results, f, indent=1)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(argv=None) -> int:
    args = argument_parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    return run_guarded(lambda: run(args))
