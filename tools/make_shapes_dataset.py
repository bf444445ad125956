#!/usr/bin/env python
"""Write the built-in shapes data set ahead of its first use, or verify the files that are there."""

import argparse
import sys

from d2ext.data import shapes
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError


def argument_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "splits",
        nargs="*",
        default=["train", "val"],
        metavar="SPLIT",
        help=f"any of {', '.join(shapes.SPLITS)} (default: train val)",
    )
    parser.add_argument(
        "--root", help="data set folder (default: $DETECTRON2_DATASETS or datasets)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read all files back and compare the content hash"
    )
    return parser


def make(splits, root=None, verify=False):
    """Generate the splits and print one line each: folder, number of images, content hash."""
    for split in splits:
        folder = shapes.generate(split, root)
        manifest = shapes.read_manifest(folder)
        expected = manifest["content_sha256"]
        if verify and shapes.content_hash(folder) != expected:
            raise UserError(f"the files of {folder} were changed; delete the folder to rewrite it")
        print(f"{folder}: {manifest['num_images']} images, sha256 {expected}")


def main(argv=None):
    args = argument_parser().parse_args(argv)
    return run_guarded(lambda: make(args.splits, args.root, args.verify))


if __name__ == "__main__":
    sys.exit(main())
