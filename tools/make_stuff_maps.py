#!/usr/bin/env python
"""Make semantic maps for HTC out of COCO's panoptic annotations or COCO-Stuff's pixel maps.

examples:
  %(prog)s panoptic datasets/coco/annotations/panoptic_train2017.json \\
      datasets/coco/panoptic_train2017 datasets/coco/panoptic_stuff_train2017
  %(prog)s pixelmaps stuff_train2017_pixelmaps datasets/coco/stuffthingmaps/train2017

The first make the data set coco_2017_train_panoptic_stuff, the second coco_2017_train_stuff.
"""

import argparse
import os
import sys

from d2ext.data.coco_stuff import convert_panoptic, convert_pixelmaps
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError


def argument_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s {panoptic JSON,pixelmaps} FOLDER OUT",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    panoptic = kinds.add_parser("panoptic", help="panoptic annotations")
    panoptic.add_argument("json_file", help="panoptic_*.json")
    pixelmaps = kinds.add_parser("pixelmaps", help="stuff_*_pixelmaps of COCO-Stuff")
    for kind in (panoptic, pixelmaps):
        kind.add_argument("folder", help="folder of their PNG files")
        kind.add_argument("out", help="folder of the maps to be written")
    return parser


def convert(args):
    """Convert all maps and print how many there are."""
    if not os.path.isdir(args.folder):
        raise UserError(f"folder {args.folder} does not exist")
    if args.kind == "panoptic":
        count = convert_panoptic(args.json_file, args.folder, args.out)
    else:
        count = convert_pixelmaps(args.folder, args.out)
    print(f"{count} maps in {args.out}")


def main(argv=None):
    args = argument_parser().parse_args(argv)
    return run_guarded(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
