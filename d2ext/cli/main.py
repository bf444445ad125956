"""`d2ext COMMAND ...`: finds the module of a command and hands the rest of the line to it."""

import importlib
import sys
import textwrap
from typing import NamedTuple

from d2ext.config.overrides import nearest
from d2ext.version import __version__


class Command(NamedTuple):
    """Its module, whose `main(arguments)` gives the exit status, and words to put in front."""

    module: str
    help: str
    words: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train", "train a network, with your own data too"),
    "eval": Command("train", "evaluate weights", ("--eval-only",)),
    "predict": Command("predict", "draw and list what a network finds in images"),
    "predict-job": Command("predict_job", "predict very many images, in processes that share them"),
    "convert": Command("convert", "annotations of other programs to COCO's format"),
    "split": Command("convert", "part a data set into train, val and test", ("split",)),
    "check": Command("check", "look for mistakes in annotations and images"),
    "compare": Command("compare", "models side by side: numbers, charts, pictures in one page"),
    "export": Command("export", "a trained network as one file: ONNX, torch.export"),
    "stages": Command("stages", "evaluate a cascade stage by stage"),
    "list": Command("list_configs", "shipped configs, with published AP"),
    "info": Command("info", "versions, compiled kernels, GPU: for bug reports"),
    "new-project": Command("new_project", "write a package for a network of your own"),
    "completion": Command("completion", "a script for the Tab key of your shell"),
}
_EXAMPLES = """examples:
  d2ext convert labelme photos --output my.json
  d2ext split my.json --images photos --output mydata --shares 0.7 0.3 0
  d2ext train mask_rcnn_tiny_finetune --data mydata OUTPUT_DIR=output/my
  d2ext predict --weights output/my/model_best.pth --input new/*.jpg --output output/pictures
  d2ext compare output/my output/other --data mydata --output output/compared"""

STATUSES = {
    0: "done",
    1: "a mistake, which one line on stderr names with its mend; check: errors in the data; "
    "predict: some images could not be read",
    2: "a command line that cannot be understood",
    130: "interrupted by Ctrl-C, or by SIGTERM in a training; a training has saved its state",
    143: "ended by SIGTERM elsewhere",
}


def usage() -> str:
    """What `d2ext --help` prints."""
    rows = [f"  {name:<12} {command.help}" for name, command in COMMANDS.items()]
    lines = ["usage: d2ext COMMAND ..., d2ext COMMAND --help", "", "commands:", *rows]
    statuses = [
        textwrap.fill(f"  {status:<4} {text}", 90, subsequent_indent=" " * 7)
        for status, text in STATUSES.items()
    ]
    return "\n".join([*lines, "", _EXAMPLES, "", "exit status:", *statuses])


def main(arguments: list[str] | None = None) -> int:
    """Run a command and give its exit status.

    Args:
        arguments: default `sys.argv[1:]`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"d2ext {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: d2ext has no command '{name}'{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    sys.argv[0] = f"d2ext {name}"  # what --help and errors of argparse call the program
    module = importlib.import_module(f"d2ext.cli.{command.module}")
    return module.main([*command.words, *rest]) or 0
