#!/usr/bin/env python3
"""Look after a copy of VOC SDS: check what is there, make the image lists, convert it to COCO JSON.

python tools/voc_sds.py check                              every file, and what is missing
python tools/voc_sds.py lists --voc-val VOC2012/ImageSets/Main/val.txt
python tools/voc_sds.py convert val --output voc_sds_val.json
python tools/voc_sds.py example mydata                     a drawn miniature to try things with
"""

import argparse
import os
import sys

from PIL import Image
from tqdm import tqdm

from d2ext.data.catalog import datasets_root
from d2ext.data.json_files import write_json
from d2ext.data.voc_sds import SPLITS
from d2ext.data.voc_sds.coco import convert_split
from d2ext.data.voc_sds.example import LAYOUTS, make_example
from d2ext.data.voc_sds.files import (
    find_folder,
    image_file,
    list_file,
    mat_file,
    read_instances,
    read_list,
)
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

SHOWN = 5  # names of missing files, and lines on broken ones, before "and so many more"


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument(
        "--root", help="folder of all data sets; default $DETECTRON2_DATASETS or datasets"
    )
    check = commands.add_parser("check", parents=[root], help="what is there, missing or broken")
    check.add_argument("--fast", action="store_true", help="do not open the files")
    lists = commands.add_parser("lists", parents=[root], help="write train.txt and val.txt")
    lists.add_argument("--voc-val", required=True, help="VOC2012/ImageSets/Main/val.txt")
    convert = commands.add_parser("convert", parents=[root], help="write a COCO instances file")
    convert.add_argument("split", choices=list(SPLITS))
    convert.add_argument("--output", required=True)
    example = commands.add_parser("example", help="write a miniature of drawn images")
    example.add_argument("folder", help="becomes a folder of data sets")
    example.add_argument("--layout", choices=list(LAYOUTS), default="mnc")
    return parser


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"and {more} more"] if more > 0 else [])


def _missing(folder, names):
    """Lines on files that are not there, one per kind of file."""
    places = {
        "images (img/ or JPEGImages/)": lambda name: image_file(folder, name) is not None,
        "inst/*.mat": lambda name: os.path.isfile(mat_file(folder, "inst", name)),
        "cls/*.mat": lambda name: os.path.isfile(mat_file(folder, "cls", name)),
    }
    lines = []
    for kind, exists in places.items():
        lost = [name for name in names if not exists(name)]
        if lost:
            text = ", ".join(_shortened(lost))
            lines.append(f"{len(lost)} of {len(names)} {kind} are missing: {text}")
    return lines


def _broken(folder, names, split):
    """One line for each image whose files are there but cannot be used."""
    lines = []
    for name in tqdm(names, desc=split, unit="img", disable=None, leave=False):
        path = image_file(folder, name)
        mats = [mat_file(folder, kind, name) for kind in ("inst", "cls")]
        if path is None or not all(map(os.path.isfile, mats)):
            continue  # listed as missing
        try:
            read_instances(folder, name)
            with Image.open(path) as image:
                image.load()  # the pixels too: a truncated file has a good header
        except UserError as e:
            lines.append(str(e))
        except (OSError, ValueError, SyntaxError) as e:
            lines.append(f"cannot read image {path}: {' '.join(str(e).split())}")
    return lines


def check(root: str, fast: bool = False) -> bool:
    """Print what is there, missing and broken; True if nothing is."""
    folder = find_folder(root)
    print(f"VOC SDS in {folder}")
    complete, names = True, {}
    for split, released in SPLITS.items():
        try:
            names[split] = read_list(folder, split)
        except UserError as e:
            print(f"{split}: {e}")
            complete = False
            continue
        count = len(names[split])
        remark = "" if count == released else f", not the {released} of the released list"
        print(f"{split}: {count} images in {list_file(folder, split)}{remark}")
        problems = _missing(folder, names[split])
        problems += [] if fast else _shortened(_broken(folder, names[split], split))
        for line in problems:
            print(f"  {line}")
        complete &= not problems and count == released
    both = sorted(set(names.get("train", ())) & set(names.get("val", ())))
    if both:
        print(f"{len(both)} images are in both lists: {', '.join(_shortened(both))}")
    print("complete" if complete and not both else "not complete, see above")
    return complete and not both


def make_lists(root: str, voc_val: str) -> None:
    """Write ImageSets/Main/train.txt (SBD outside of VOC 2012 val) and val.txt (SBD inside)."""
    folder = find_folder(root)
    try:
        with open(voc_val, encoding="ascii") as f:
            inside = {line.split()[0] for line in f if line.strip()}
    except OSError as e:
        raise UserError(f"cannot read {voc_val}: {e.strerror}") from e
    names = sorted(
        os.path.splitext(entry)[0]
        for entry in os.listdir(os.path.join(folder, "inst"))
        if entry.endswith(".mat")
    )
    lists = {
        "train": [name for name in names if name not in inside],
        "val": [name for name in names if name in inside],
    }
    counts = {split: len(lists[split]) for split in lists}
    if counts != SPLITS:
        raise UserError(
            f"{len(names)} annotations in {folder}/inst split by {voc_val} give {counts}, not "
            f"{SPLITS}; is the folder complete, and the list that of ImageSets/Main?"
        )
    for split, chosen in lists.items():
        # Not over the lists of SBD itself, which its archive has in the folder.
        path = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="ascii") as f:
            f.write("".join(f"{name}\n" for name in chosen))
        print(f"{path}: {len(chosen)} images")


def run(args: argparse.Namespace) -> int:
    """One command; 1 if the checked folder is not complete."""
    if args.command == "example":
        names = make_example(args.folder, layout=args.layout)
        counts = ", ".join(f"{len(names[split])} for {split}" for split in names)
        print(f"{args.folder}/{LAYOUTS[args.layout]}: images {counts}")
        print(f"use it with DETECTRON2_DATASETS={args.folder}")
        return 0
    root = args.root or datasets_root()
    if args.command == "check":
        return 0 if check(root, args.fast) else 1
    if args.command == "lists":
        make_lists(root, args.voc_val)
        return 0
    data = convert_split(find_folder(root), args.split, root)
    write_json(data, args.output)
    print(
        f"{args.output}: {len(data['images'])} images, {len(data['annotations'])} objects; "
        f"image folder {root}"
    )
    return 0


def main(arguments=None) -> int:
    """Command line; 1 for a mistake of the user or an incomplete folder."""
    args = build_parser().parse_args(arguments)
    return run_guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
