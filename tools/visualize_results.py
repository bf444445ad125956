#!/usr/bin/env python
"""Draw results beside the ground truth: `coco_instances_results.json` of an evaluation, or
`predictions.json` of `d2ext predict`."""

import argparse
import os
import random
import sys
from collections import defaultdict

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2ext.data import get_dataset_records, parse_register, register_all, register_coco_dataset
from d2ext.engine.cli import check_score, run_guarded
from d2ext.errors import UserError
from d2ext.evaluation.results import fit_results, read_results, to_instances
from d2ext.visualization import (
    draw_ground_truth,
    draw_predictions,
    panel_scale,
    picture_stems,
    side_by_side,
)

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", required=True, metavar="FILE.json", help="COCO results")
    parser.add_argument("--dataset", metavar="NAME", help="the data set they belong to")
    parser.add_argument(
        "--register",
        metavar="NAME=ANN.json,IMAGES",
        help="COCO-format data set; used itself when there is no --dataset",
    )
    parser.add_argument("--output-dir", default="output/results", help="(default: %(default)s)")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--num-images", type=int, default=16, help="0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--shuffle", type=int, metavar="SEED", help="draw a random choice instead of the first ones"
    )
    return parser


def draw(record: dict, results: list, metadata, threshold: float) -> np.ndarray:
    """Ground truth and predictions of one image, side by side."""
    try:
        rgb = read_image(record["file_name"], "RGB")
    except OSError as error:
        raise UserError(f"cannot read image {record['file_name']}: {error}") from error
    class_ids = metadata.get("thing_dataset_id_to_contiguous_id")
    instances = to_instances(results, rgb.shape[:2], class_ids)
    shown = int((instances.scores >= threshold).sum())
    scale = panel_scale(*rgb.shape[:2])
    return side_by_side(
        [
            draw_ground_truth(record, metadata, rgb, scale),
            draw_predictions(rgb, instances, metadata, threshold, scale),
        ],
        [
            f"ground truth: {len(record['annotations'])}",
            f"predictions of {threshold:.0%} or more: {shown}",
        ],
    )


def visualize(args) -> None:
    if not (args.dataset or args.register):
        raise UserError("which data set? give --dataset NAME or --register NAME=ANN.json,IMAGES")
    if args.num_images < 0:
        raise UserError("--num-images must not be negative")
    check_score("--confidence-threshold", args.confidence_threshold)
    results = read_results(args.results)
    register_all()
    name = args.dataset
    if args.register:
        spec = parse_register(args.register)
        register_coco_dataset(*spec)
        name = name or spec.name
    records = get_dataset_records(name)
    metadata = MetadataCatalog.get(name)
    numbers = metadata.get("thing_dataset_id_to_contiguous_id")
    class_ids = {metadata.thing_classes[label]: number for number, label in numbers.items()}
    by_image = defaultdict(list)
    for result in fit_results(results, records, class_ids, args.results):
        by_image[result["image_id"]].append(result)
    if args.shuffle is not None:
        random.Random(args.shuffle).shuffle(records)
    records = records[: args.num_images or None]
    os.makedirs(args.output_dir, exist_ok=True)
    stems = picture_stems([record["file_name"] for record in records])
    for record, stem in zip(tqdm(records, unit="img", disable=None, leave=False), stems):
        found = by_image[record["image_id"]]
        picture = draw(record, found, metadata, args.confidence_threshold)
        Image.fromarray(picture).save(os.path.join(args.output_dir, f"{stem}.png"))
    print(f"{len(records)} pictures of {name} in {args.output_dir}")


def main(argv=None) -> int:
    args = argument_parser().parse_args(argv)
    return run_guarded(lambda: visualize(args))


if __name__ == "__main__":
    sys.exit(main())
