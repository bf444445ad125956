"""Check data sets for mistakes in annotations, images and semantic maps, and print them as a table.

The same check runs before every training, on the headers of the images only.
"""

import argparse

from d2ext.data import check_dataset, check_files, parse_register, register_all
from d2ext.data.remote import local_path
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", action="append", default=[], help="registered name (may be repeated)"
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANN.json,IMAGES[,SEMANTIC]",
        help="COCO-format data set (may be repeated)",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="decode every image, which finds truncated ones"
    )
    parser.add_argument(
        "--evaluated",
        action="store_true",
        help="check what only evaluation needs as well, as for a set of DATASETS.TEST",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=5,
        help="rows for each kind of problem, 0 for all (default: %(default)s)",
    )
    return parser


def check(args):
    """Print the table of each data set; 1 if there is an error in one of them."""
    if not (args.dataset or args.register):
        raise UserError("nothing to check; give --dataset NAME or --register NAME=ANN.json,IMAGES")
    if args.rows < 0:
        raise UserError("--rows must not be negative")
    register_all()
    options = {"evaluated": args.evaluated, "thorough": args.thorough}
    reports = []
    for name, *paths in map(parse_register, args.register):
        reports.append(check_files(name, *(path and local_path(path) for path in paths), **options))
    reports += [check_dataset(name, **options) for name in args.dataset]
    for report in reports:
        print(report.table(args.rows) if report.problems else f"{report.name}: no problem found")
    return int(any(report.of("error") for report in reports))


def main(argv=None):
    args = argument_parser().parse_args(argv)
    return run_guarded(lambda: check(args))
