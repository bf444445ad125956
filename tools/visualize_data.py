#!/usr/bin/env python
"""Draw a data set: image, instances and the semantic map if there is one; as annotated or, with
--augmented, as the training loader of a config gives it to the network."""

import argparse
import itertools
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from d2ext.data import get_dataset_records, parse_register, register_all, register_coco_dataset
from d2ext.engine import build_experiment
from d2ext.engine.cli import run_guarded
from d2ext.errors import UserError
from d2ext.visualization import (
    draw_ground_truth,
    draw_semantic,
    draw_training_input,
    panel_scale,
    picture_stems,
    resized,
    training_image,
)

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image


def argument_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", help="registered name, for example shapes_val")
    parser.add_argument(
        "--register",
        metavar="NAME=ANN.json,IMAGES[,SEMANTIC]",
        help="COCO-format data set; drawn itself when there is no --dataset",
    )
    parser.add_argument(
        "--augmented",
        metavar="CONFIG",
        help="draw what a training with this config shows the network, in its order; of the "
        "config's training sets unless there is a --dataset or --register",
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
    parser.add_argument(
        "--scale",
        type=float,
        help="enlargement (default: what suits the image, at most 1200 pixels)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY=VALUE", help="overrides of the config of --augmented"
    )
    return parser


def _read(path, mode):
    try:
        return read_image(path, mode)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e}") from e


def _side_by_side(rgb, instances, semantic, scale):
    """Panels of one size in a row: image, instances and, unless None, the semantic map."""
    panels = [resized(rgb, scale), instances]
    panels += [draw_semantic(rgb, *semantic, scale)] if semantic else []
    return np.concatenate(panels, axis=1)


def draw_record(record: dict, metadata, scale: float | None = None) -> np.ndarray:
    """Panels side by side: image, instances, semantic map (the latter only when there is one).

    Args:
        record: detectron2 record.
        metadata: of its data set.
        scale: panel size relative to the image; default: `panel_scale`.

    Returns:
        uint8 RGB (H * scale, panels * W * scale, 3), rounded.
    """
    rgb = _read(record["file_name"], "RGB")
    scale = scale or panel_scale(*rgb.shape[:2])
    semantic = None
    if "sem_seg_file_name" in record:
        labels = _read(record["sem_seg_file_name"], "L")[:, :, 0]
        semantic = labels, semantic_names(metadata)
    return _side_by_side(rgb, draw_ground_truth(record, metadata, rgb, scale), semantic, scale)


def semantic_names(metadata, derived: bool = False) -> list[str]:
    """Names of semantic labels.

    Args:
        metadata: of a data set.
        derived: whether the labels are made of the instances, see `semantic_from_instances`.
    """
    if derived:
        return [*metadata.thing_classes, "background"]
    return list(metadata.get("stuff_classes") or map(str, range(255)))


def annotated_pictures(name: str, args: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """File name and picture of each image of a data set."""
    records = get_dataset_records(name)
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(records)
    records = records[: args.num_images or None]
    stems = picture_stems([record["file_name"] for record in records])
    for record, stem in zip(records, stems):
        yield f"{stem}.png", draw_record(record, MetadataCatalog.get(name), args.scale)


def augmented_pictures(
    name: str | None, args: argparse.Namespace
) -> Iterator[tuple[str, np.ndarray]]:
    """File name and picture of each image of a training, numbered in its order.

    Args:
        name: of the data set, or None for those of the config.
        args: of the command line.
    """
    if args.shuffle is not None or not args.num_images:
        raise UserError(
            "--augmented shows a training from its start, which has no end and an order of its "
            "own: leave out --shuffle (SEED=1 is another order) and --num-images 0"
        )
    data = [f"DATASETS.TRAIN={name}", f"DATASETS.TEST={name}"] if name else []
    register = [args.register] if args.register else []
    experiment = build_experiment(args.augmented, [*data, *args.opts], register)
    if not experiment.train_sets():
        raise UserError(f"{args.augmented} has no training set; name one by --dataset")
    metadata = MetadataCatalog.get(experiment.train_sets()[0])
    mode = experiment.semantic_mode()
    derived = mode == "instances" or (mode == "auto" and not metadata.get("sem_seg_root"))
    loader = experiment.build_train_loader()
    samples = itertools.chain.from_iterable(loader)
    for number, sample in enumerate(itertools.islice(samples, args.num_images), start=1):
        rgb = training_image(sample, experiment.image_format)
        scale = args.scale or panel_scale(*rgb.shape[:2])
        drawn = draw_training_input(sample, metadata, experiment.image_format, scale)
        semantic = None
        if "sem_seg" in sample:
            semantic = sample["sem_seg"].numpy(), semantic_names(metadata, derived)
        stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
        yield f"{number:04d}_{stem}.png", _side_by_side(rgb, drawn, semantic, scale)


def visualize(args):
    """Draw as many images as the arguments say and print where they are."""
    if not (args.dataset or args.register or args.augmented):
        raise UserError("nothing to draw; give --dataset NAME or --register NAME=ANN.json,IMAGES")
    if (args.scale is not None and args.scale <= 0) or args.num_images < 0:
        raise UserError("--scale must be positive and --num-images not negative")
    if args.opts and not args.augmented:
        raise UserError(f"{args.opts[0]} is for a config, which --augmented names")
    name = args.dataset
    if args.register:
        name = name or parse_register(args.register).name
    if args.augmented:
        pictures = augmented_pictures(name, args)
    else:
        register_all()
        if args.register:
            register_coco_dataset(*parse_register(args.register))
        pictures = annotated_pictures(name, args)
    os.makedirs(args.output_dir, exist_ok=True)
    count = 0
    for file, picture in pictures:
        Image.fromarray(picture).save(os.path.join(args.output_dir, file))
        count += 1
    print(f"{count} pictures of {name or args.augmented} in {args.output_dir}")


def main(argv=None):
    args = argument_parser().parse_intermixed_args(argv)
    return run_guarded(lambda: visualize(args))


if __name__ == "__main__":
    sys.exit(main())
