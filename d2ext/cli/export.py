"""Write a trained network as one file that predicts elsewhere: ONNX, or a program of
torch.export."""

import argparse
import logging
import os
import warnings

import torch

from d2ext.config import load_projects
from d2ext.engine import Predictor, build_experiment
from d2ext.engine.cli import run_guarded
from d2ext.engine.exporting import export_model
from d2ext.errors import UserError

_EPILOG = """
examples:
  %(prog)s --weights output/my/model_final.pth --output model.onnx
  %(prog)s --weights output/my/model_final.pth --output model.onnx --stages
  %(prog)s --config-file htc_tiny --weights model.pth --output model.pt2 \\
           TEST.DETECTIONS_PER_IMAGE=20
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: the config's)")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help=".yaml or .py config (default: the one that the weights were trained with)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help=".onnx for a file of ONNX, .pt2 for a program of torch.export",
    )
    parser.add_argument(
        "--stages", action="store_true", help="with the results after each stage of a cascade"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> None:
    load_projects()
    if args.config_file:
        experiment = build_experiment(args.config_file, args.opts, with_data=False)
        weights = args.weights or experiment.init_checkpoint
        predictor = Predictor(experiment, weights=args.weights, device="cpu")
    elif args.weights:
        weights = args.weights
        predictor = Predictor.from_weights(weights, args.opts, device="cpu")
    else:
        raise UserError("nothing to export: give --weights, --config-file or both")
    settings = export_model(predictor, weights, args.output, args.stages)
    size = os.path.getsize(args.output) / 1e6
    print(
        f"{args.output}: {settings.network}, {len(settings.class_names)} classes, {size:.1f} MB, "
        f"images of {settings.short_edge} pixels (short edge)"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 for a mistake of the user."""
    args = argument_parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    with torch.no_grad():
        return run_guarded(lambda: run(args))
