"""Turn annotations of other programs into a COCO instances file for --register, and split one.

d2ext convert labelme photos --output photos.json
d2ext convert yolo data.yaml --split train --output train.json
d2ext convert masks masks --images photos --class-name cell --output cells.json
d2ext convert masks SegmentationObject --images JPEGImages \\
    --class-maps SegmentationClass --output voc.json
d2ext convert cvat annotations/instances_default.json --output cvat.json
d2ext convert roboflow train/_annotations.coco.json --output train.json
d2ext split photos.json --images photos --output split --shares 0.7 0.2 0.1 --seed 0
"""

import argparse
import os

import numpy as np

from d2ext.data.check.coco_file import read_coco_file
from d2ext.data.convert.coco_export import read_coco_export
from d2ext.data.convert.duplicates import duplicate_groups, image_paths
from d2ext.data.convert.labelme import read_labelme
from d2ext.data.convert.masks import read_masks
from d2ext.data.convert.objects import SEGMENTATIONS, to_coco_file
from d2ext.data.convert.split import split_coco
from d2ext.data.convert.yolo import read_yolo
from d2ext.data.folder import IMAGES
from d2ext.data.json_files import write_json
from d2ext.data.register import check_coco_file
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

SHOWN = 5  # notes before "and so many more"
PARTS = ("train", "val", "test")


def argument_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("source", help="folder or file of the annotations")
    common.add_argument("--output", required=True, help="COCO file to write; for split a folder")
    common.add_argument("--images", help="folder of the images")
    form = argparse.ArgumentParser(add_help=False)
    form.add_argument(
        "--segmentation",
        choices=SEGMENTATIONS,
        default="polygon",
        help="polygon keeps polygons, rle draws them (default: %(default)s)",
    )
    form.add_argument("--classes", help="names in their order: a,b,c or a file with one per line")
    both = [common, form]
    commands.add_parser("labelme", parents=both, help="folder of labelme's JSON files")
    yolo = commands.add_parser("yolo", parents=both, help="data.yaml with polygons in text files")
    yolo.add_argument("--split", default="train", choices=PARTS)
    masks = commands.add_parser("masks", parents=both, help="folder of PNG masks of instances")
    masks.add_argument("--class-maps", help="folder of PNG maps of classes")
    masks.add_argument("--class-name", default="", help="the class of all objects")
    cvat = commands.add_parser("cvat", parents=both, help="COCO file of CVAT")
    cvat.add_argument("--keep-crowds", action="store_true", help="leave iscrowd as it is")
    commands.add_parser("roboflow", parents=both, help="COCO file of Roboflow")
    split = commands.add_parser("split", parents=[common], help="train, val and test by image")
    split.add_argument(
        "--shares",
        nargs=3,
        type=float,
        default=(0.7, 0.2, 0.1),
        metavar=tuple(name.upper() for name in PARTS),
        help="of the images; 0 leaves a part out (default: 0.7 0.2 0.1)",
    )
    split.add_argument("--seed", type=int, default=0)
    split.add_argument(
        "--ignore-duplicates",
        action="store_true",
        help="do not look for images that show the same",
    )
    return parser


def _class_list(text: str | None) -> list[str] | None:
    if not text:
        return None
    if os.path.isfile(text):
        with open(text, encoding="utf-8-sig") as f:
            names = f.read().splitlines()
    else:
        names = text.split(",")
    return [name.strip() for name in names if name.strip()]


def _image_root(args: argparse.Namespace) -> str:
    """Folder of the images, where each program puts it."""
    folder = os.path.dirname(args.source) or "."
    defaults = {
        "labelme": [args.source],
        "cvat": [
            os.path.join(folder, "..", "images", "default"),
            os.path.join(folder, "../images"),
        ],
        "roboflow": [folder],
        "yolo": [folder],
    }
    if not args.images and args.command not in defaults:
        raise UserError(f"{args.command} needs the folder of the images; add --images FOLDER")
    places = [args.images] if args.images else defaults[args.command]
    found = next((place for place in places if os.path.isdir(place)), None)
    if found is None:
        raise UserError(f"image folder {places[0]} does not exist; name it: --images FOLDER")
    return os.path.normpath(found)


def _read(args: argparse.Namespace, root: str):
    if args.command == "labelme":
        return read_labelme(args.source, args.images)
    if args.command == "yolo":
        return read_yolo(args.source, args.split)
    if args.command == "masks":
        names = (args.class_maps, args.class_name, _class_list(args.classes))
        return read_masks(args.source, root, *names)
    crowds_are_objects = args.command == "cvat" and not args.keep_crowds
    return read_coco_export(args.source, root, crowds_are_objects)


def _describe(path: str, data: dict, root: str) -> str:
    name = os.path.splitext(os.path.basename(path))[0]
    return (
        f"{path}: {len(data['images'])} images, {len(data['annotations'])} objects, "
        f"{len(data['categories'])} classes; use it with --register {name}={path},{root}"
    )


def convert(args: argparse.Namespace) -> None:
    """Read annotations, and write them as COCO's."""
    if not os.path.exists(args.source):
        raise UserError(f"{args.source} does not exist")
    if os.path.isdir(args.source) is not (args.command in ("labelme", "masks")):
        wanted = "folder" if args.command in ("labelme", "masks") else "file"
        raise UserError(f"{args.source}: {args.command} needs a {wanted}; see --help")
    root = _image_root(args)
    annotations = _read(args, root)
    data = to_coco_file(annotations, root, args.segmentation, _class_list(args.classes))
    write_json(data, args.output)
    more = len(annotations.notes) - SHOWN
    for note in annotations.notes[:SHOWN] + ([f"and {more} more"] if more > 0 else []):
        print(f"note: {note}")
    print(_describe(args.output, data, root))


def split(args: argparse.Namespace) -> None:
    """Write train.json, val.json and test.json."""
    if min(args.shares) < 0 or abs(sum(args.shares) - 1) > 1e-6:
        raise UserError(f"--shares {args.shares} must not be negative and have to add up to 1")
    root = _image_root(args)
    check_coco_file(args.source)
    data = read_coco_file(args.source)
    if args.ignore_duplicates:
        groups = np.arange(len(data["images"]))
    else:
        groups = duplicate_groups(image_paths(data, root))
    parts, notes = split_coco(data, groups, dict(zip(PARTS, args.shares)), args.seed)
    for note in notes:
        print(f"note: {note}")
    for name, part in parts.items():
        path = os.path.join(args.output, f"{name}.json")
        place = os.path.relpath(root, args.output)
        write_json({**part, "info": {**(part.get("info") or {}), IMAGES: place}}, path)
        print(_describe(path, part, root))
    print(f"train with d2ext train CONFIG --data {args.output}")


def main(arguments=None) -> int:
    """Command line; 1 for a mistake of the user."""
    args = argument_parser().parse_args(arguments)
    return run_guarded(lambda: split(args) if args.command == "split" else convert(args))
