"""The command line of every `projects/*/train_net.py`."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from d2ext.config import find_config
from d2ext.data.folder import find_data
from d2ext.engine import launch
from d2ext.engine.experiment import Experiment
from d2ext.engine.folder import training_folder
from d2ext.engine.limits import check_device
from d2ext.engine.loop import evaluate_checkpoint, train
from d2ext.engine.recipe import OPTIONS, take_options
from d2ext.engine.restarts import is_restarted, note_start
from d2ext.engine.setup import (
    build_experiment,
    check_data,
    make_output_folder,
    save_config,
    start_log,
)
from d2ext.errors import UserError

from detectron2.engine import default_argument_parser

logger = logging.getLogger(__name__)

_EPILOG = """
examples:
  train                %(prog)s CONFIG.py train.output_dir=output/run1
  continue             %(prog)s --config-file CONFIG.py train.output_dir=output/run1 --resume
  start anew           %(prog)s --config-file CONFIG.py train.output_dir=output/run1 --overwrite
  evaluate             %(prog)s --config-file CONFIG.yaml --eval-only MODEL.WEIGHTS=model.pth
  your own data        %(prog)s mask_rcnn_tiny_finetune --data mydata OUTPUT_DIR=output/run1
  or file by file      %(prog)s --config-file CONFIG.yaml --register my=ann.json,images \\
                           DATASETS.TRAIN=my DATASETS.TEST=my
  two CPU processes    torchrun --nproc-per-node=2 %(prog)s --config-file CONFIG.yaml
"""


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's options plus those about data; overrides may stand anywhere."""
    base = default_argument_parser(epilog=" ")
    helps = {
        "resume": "continue from the last checkpoint in the output folder, exactly",
        "eval_only": "evaluate the weights named by an override, else the last checkpoint in the "
        "output folder, else the config's weights",
        "config_file": "a .yaml or .py file, or the name of a shipped config; may be given without "
        "the option, as the first word",
        "num_gpus": "number of GPUs of this machine (default: one, or the CPU without any)",
    }
    parser = argparse.ArgumentParser(
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for action in base._actions:  # the same options, but overrides that do not swallow them
        if action.option_strings and "--help" not in action.option_strings:
            action.help = helps.get(action.dest, action.help)
            if action.dest == "num_gpus":  # so that one that was asked for can be refused
                action.default = None
            parser._add_action(action)
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANN.json,IMAGES[,SEMANTIC]",
        help="make a COCO-format data set known under NAME (may be repeated)",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="with train.json, val.json, test.json, as d2ext split writes it; or the name of "
        "registered sets, such as shapes. A training is evaluated on val, else on test; "
        "--eval-only takes both",
    )
    parser.add_argument("--images", metavar="FOLDER", help="of --data, where they are elsewhere")
    parser.add_argument("--weights", metavar="FILE", help="the same as MODEL.WEIGHTS=FILE")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="train in an output folder that has a run; that one is moved to FOLDER.1, FOLDER.2, "
        "..., never deleted",
    )
    parser.add_argument(
        "--no-data-check",
        action="store_true",
        help="train or evaluate without looking for mistakes in the annotations and images first",
    )
    _add_recipe_options(parser)
    add_rename_option(parser)
    parser.add_argument(
        "opts", nargs="*", metavar="KEY=VALUE", help="config overrides, the same for yaml and lazy"
    )
    return parser


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "recipes (configs *_finetune), instead of what their rules say"
    )
    group.add_argument("--epochs", type=float, help="how often every image is seen")
    group.add_argument("--image-size", type=int, help="short side of the images, in pixels")
    group.add_argument("--batch-size", type=int, help="images of an iteration")


def add_rename_option(parser: argparse.ArgumentParser) -> None:
    """Add `--rename-classes`, for commands that compare class names of weights and of data."""
    parser.add_argument(
        "--rename-classes",
        action="store_true",
        help="the classes of the data are those that the weights were trained on, under other "
        "names: evaluate or resume all the same",
    )


def run_guarded(function: Callable[[], int | None]) -> int:
    """Run a program; a `UserError` becomes one line on stderr and exit status 1. Under `torchrun`,
    the first process that has it prints it.

    `D2EXT_TRACEBACK=1` shows the traceback as well. Ctrl-C where nothing is to be saved: 130.
    """
    try:
        return function() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        if os.environ.get("D2EXT_TRACEBACK"):
            raise
        if launch.is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def check_score(name: str, value: float) -> None:
    """Raise a `UserError` unless the value of an option is a score, which lies in 0..1."""
    if not 0 <= value <= 1:
        mend = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise UserError(f"{name} is {value:g}; scores lie between 0 and 1{mend}")


def main(argv: list[str] | None = None) -> None:
    """Train or evaluate as the command line says; exits with status 1 on a user's mistake.

    Args:
        argv: arguments, default `sys.argv[1:]`.
    """
    args = argument_parser().parse_intermixed_args(argv)
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    sys.exit(run_guarded(lambda: _main(args)))


def _main(args: argparse.Namespace) -> None:
    _take_words(args)
    experiment = _build(args)
    check_device(experiment)
    launch.run(run_worker, args, experiment.device)


def _take_words(args: argparse.Namespace) -> None:
    """Turn the config's name, `--data` and `--weights` into what they stand for."""
    if not args.config_file and args.opts and "=" not in args.opts[0]:
        args.config_file = args.opts.pop(0)
    if not args.config_file:
        raise UserError("no config; name a shipped one or a .yaml or .py file, see --help")
    args.config_file = find_config(args.config_file)
    settings = []
    if args.data:
        names, texts = find_data(args.data, args.images)
        args.register += texts
        tested = [names[part] for part in ("val", "test") if part in names]
        if args.eval_only and not tested:
            raise UserError(f"--data {args.data} has nothing to evaluate on: no val and no test")
        if not args.eval_only and "train" not in names:
            raise UserError(f"--data {args.data} has no train part to train on")
        if "train" in names:
            settings.append(f"DATASETS.TRAIN={names['train']}")
        settings.append(f"DATASETS.TEST={tuple(tested if args.eval_only else tested[:1])}")
    elif args.images:
        raise UserError("--images is for --data; with --register the folder is part of it")
    if args.weights:
        settings.append(f"MODEL.WEIGHTS={args.weights}")
    args.opts[:0] = settings


def _build(args: argparse.Namespace) -> Experiment:
    experiment = build_experiment(
        args.config_file, args.opts, args.register, eval_only=args.eval_only
    )
    experiment.rename_classes = args.rename_classes
    take_options(experiment, {name: getattr(args, name) for name in OPTIONS})
    return experiment


def run_worker(args: argparse.Namespace) -> None:
    """What each process does."""
    experiment = _build(args)
    if args.eval_only:
        if not experiment.test_sets():
            raise UserError(
                "nothing to evaluate on: set DATASETS.TEST (yaml) or dataloader.test.dataset (lazy)"
            )
        folder = os.path.join(experiment.output_dir, "inference")  # a run's own files stay
        start_log(experiment, args, folder)
        if not args.no_data_check:
            check_data(experiment, eval_only=True)
        save_config(experiment, folder)
        evaluate_checkpoint(experiment, resume=args.resume)
        return
    folder = experiment.output_dir
    make_output_folder(folder)
    restarted = is_restarted(folder)
    resume = args.resume or restarted
    with training_folder(folder, resume, args.overwrite and not restarted):
        note_start(folder)
        start_log(experiment, args, folder)
        if restarted:
            logger.warning("torchrun has restarted the training in %s: it continues", folder)
        if not args.no_data_check:
            check_data(experiment)
        train(experiment, resume=resume)
