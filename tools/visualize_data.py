#!/usr/bin/env python
"""Draw the ground truth of a data set: image, instances and the semantic map if there is one."""

import argparse
import os
import random
import sys

import numpy as np
from PIL import Image

from d2ext import compat
from d2ext.data import get_dataset_records, parse_register, register_all, register_coco_dataset
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError

from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.utils.colormap import random_color
from detectron2.utils.visualizer import Visualizer


def argument_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="registered name, for example shapes_val")
    parser.add_argument(
        "--register",
        metavar="NAME=ANN.json,IMAGES[,SEMANTIC]",
        help="COCO-format data set; drawn itself when there is no --dataset",
    )
    parser.add_argument(
        "--output-dir", default="output/ground_truth", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--num-images", type=int, default=16, help="0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--shuffle", type=int, metavar="SEED", help="draw a random choice instead of the first ones"
    )
    parser.add_argument("--scale", type=float, default=2.0, help="(default: %(default)s)")
    return parser


def _read(path, mode):
    try:
        return read_image(path, mode)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e}") from e


def draw_instances(image, annotations, metadata, scale=1.0):
    """Boxes, names and masks of the annotations, drawn over a copy of the image.

    `Visualizer.draw_dataset_dict` would fill the holes of the masks.
    """
    visualizer = Visualizer(image, metadata, scale)
    if not annotations:
        return visualizer.get_output().get_image()
    instances = annotations_to_instances(annotations, image.shape[:2], mask_format="bitmask")
    crowd = ["|crowd" if a.get("iscrowd", 0) else "" for a in annotations]
    names = [metadata.thing_classes[c] for c in instances.gt_classes.tolist()]
    colors = [random_color(rgb=True, maximum=1) for _ in annotations]
    visualizer.overlay_instances(
        boxes=instances.gt_boxes,
        labels=[name + mark for name, mark in zip(names, crowd)],
        assigned_colors=colors,
    )
    masks = instances.gt_masks.tensor.numpy() if instances.has("gt_masks") else []
    for mask, color in zip(masks, colors):
        visualizer.draw_binary_mask(mask.astype(np.uint8), color, alpha=0.5, area_threshold=0)
    return visualizer.get_output().get_image()


def draw_record(record, metadata, scale=1.0):
    """Panels side by side: image, instances, semantic map (the latter only when there is one).

    Args:
        record: detectron2 record.
        metadata (Metadata): of its data set.
        scale: panel size relative to the image.

    Returns:
        uint8 RGB (H * scale, panels * W * scale, 3).
    """
    image = _read(record["file_name"], "RGB")
    size = (int(image.shape[1] * scale), int(image.shape[0] * scale))
    panels = [np.asarray(Image.fromarray(image).resize(size))]
    panels.append(draw_instances(image, record.get("annotations", []), metadata, scale))
    if "sem_seg_file_name" in record:
        labels = _read(record["sem_seg_file_name"], "L")[:, :, 0]
        if not metadata.get("stuff_classes"):
            metadata = Metadata(stuff_classes=[str(i) for i in range(255)])
        visualizer = Visualizer(image, metadata, scale)
        panels.append(visualizer.draw_sem_seg(labels, area_threshold=0, alpha=0.7).get_image())
    height, width = (min(p.shape[axis] for p in panels) for axis in (0, 1))
    return np.concatenate([p[:height, :width] for p in panels], axis=1)


def visualize(args):
    """Draw as many images as the arguments say and print where they are."""
    if not (args.dataset or args.register):
        raise UserError("nothing to draw; give --dataset NAME or --register NAME=ANN.json,IMAGES")
    if args.scale <= 0 or args.num_images < 0:
        raise UserError("--scale must be positive and --num-images not negative")
    compat.patch_visualization()
    register_all()
    name = args.dataset
    if args.register:
        spec = parse_register(args.register)
        register_coco_dataset(*spec)
        name = name or spec.name
    records = get_dataset_records(name)
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(records)
    records = records[: args.num_images or None]
    os.makedirs(args.output_dir, exist_ok=True)
    for record in records:
        picture = draw_record(record, MetadataCatalog.get(name), args.scale)
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        Image.fromarray(picture).save(os.path.join(args.output_dir, f"{stem}.png"))
    print(f"{len(records)} pictures of {name} in {args.output_dir}")


def main(argv=None):
    args = argument_parser().parse_args(argv)
    return run_guarded(lambda: visualize(args))


if __name__ == "__main__":
    sys.exit(main())
