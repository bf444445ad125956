"""Images in, pictures out, for any config: draws the instances a model finds, prints them as a
table and writes them to predictions.json in the style of COCO results."""

import argparse
import glob
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from d2ext.config import load_projects
from d2ext.engine import Predictor, build_experiment
from d2ext.engine.cli import check_score, run_guarded
from d2ext.engine.onnx_predictor import ENGINES, choose_engine
from d2ext.errors import UserError
from d2ext.visualization import draw_predictions, draw_stages, picture_stems

from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

_TABLE_ROWS = 25
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_EPILOG = """
examples:
  %(prog)s --weights model.pth --input photo.jpg --output output/pictures
  %(prog)s --config-file configs/mask_rcnn_tiny.py --weights model.pth \\
           --input photo.jpg 'holiday/*.jpg' --output output/pictures
  %(prog)s --weights model.onnx --input photo.jpg --output output/pictures
  %(prog)s --config-file projects/HTC/configs/htc_tiny.yaml --weights model.pth --input photos/ \\
           --stages --confidence-threshold 0.3 MODEL.ROI_HEADS.NMS_THRESH_TEST=0.4
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help=".yaml or .py config (default: the one that the weights were trained with)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint (default: the config's), or a file of ONNX that d2ext export wrote",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, help="default: onnxruntime for files of ONNX, else torch"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="IMAGE",
        help="image files, folders, or quoted patterns such as 'photos/*.jpg'",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where pictures go")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is shown and written (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the config's)")
    parser.add_argument(
        "--stages", action="store_true", help="also draw the result after each stage of a cascade"
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANN.json,IMAGES",
        help="a data set that the config names, for names of classes that the weights come without "
        "(may be repeated)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser


def expand_inputs(inputs) -> list:
    """Paths of the images that files, folders and patterns stand for, each once, in order.

    Raises:
        UserError: something stands for no file.
    """
    paths = []
    for text in inputs:
        text = os.path.expanduser(text)
        if os.path.isdir(text):
            names = sorted(os.listdir(text))
            found = [os.path.join(text, n) for n in names if Path(n).suffix.lower() in _SUFFIXES]
        elif os.path.isfile(text):
            found = [text]
        else:
            found = [p for p in sorted(glob.glob(text, recursive=True)) if os.path.isfile(p)]
        if not found:
            kind = "folder holds no images" if os.path.isdir(text) else "no such image"
            raise UserError(f"--input {text}: {kind}")
        paths += found
    return list(dict.fromkeys(paths))


def name_outputs(paths, folder) -> list:
    """A stem below `folder` for each path; images of one name from several folders are numbered.

    Raises:
        UserError: a picture would replace one of the images.
    """
    stems = [os.path.join(folder, stem) for stem in picture_stems(paths)]
    images = {os.path.realpath(p) for p in paths}
    for stem in stems:
        if os.path.realpath(stem + ".png") in images:
            raise UserError(f"--output {folder} would overwrite {stem}.png; choose another folder")
    return stems


def read_bgr(path):
    """The image, turned upright as its EXIF orientation says: uint8 (H, W, 3), BGR.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_image(path, "BGR")
    # Pillow: SyntaxError for some broken PNGs, ValueError for truncated headers.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read image {path}: {reason}") from error


def found_table(instances, class_names) -> str:
    """What was found, one line per instance, the best `_TABLE_ROWS` of them."""
    more = len(instances) - _TABLE_ROWS
    instances = instances[instances.scores.argsort(descending=True, stable=True)[:_TABLE_ROWS]]
    areas = ["-"] * len(instances)
    if instances.has("pred_masks"):
        areas = instances.pred_masks.flatten(1).sum(1).tolist()
    columns = {
        "class": [class_names[c] for c in instances.pred_classes.tolist()],
        "score": [f"{score:.3f}" for score in instances.scores.tolist()],
        "x0 y0 x1 y1": [
            " ".join(f"{x:.0f}" for x in box) for box in instances.pred_boxes.tensor.tolist()
        ],
        "mask pixels": areas,
    }
    align = ["left", "right", "left", "right"]
    if instances.has("mask_scores"):
        columns["mask score"] = [f"{score:.3f}" for score in instances.mask_scores.tolist()]
        align.append("right")
    table = tabulate(columns, headers="keys", disable_numparse=True, colalign=align)
    return f"{table}\n... and {more} more" if more > 0 else table


def coco_results(instances, image_id, path, class_names) -> list:
    """COCO results of one image, plus `file_name`, `category` (the name) and `mask_score`
    where the model scores its masks."""
    results = [
        {**result, "file_name": str(path), "category": class_names[result["category_id"]]}
        for result in instances_to_coco_json(instances, image_id)
    ]
    if instances.has("mask_scores"):
        for result, score in zip(results, instances.mask_scores.tolist()):
            result["mask_score"] = score
    return results


def stage_results(predictor: Predictor, image) -> list:
    """The instances after each stage; the last ones are the model's final result."""
    stages = predictor.model.inference_stages([predictor.prepare(image)])
    return [outputs[0]["instances"].to("cpu") for outputs in stages]


def process(predictor: Predictor, path: str, stem: str, args) -> "Instances":  # noqa: F821
    """Predict and draw one image. Returns the instances that reach the threshold, on the CPU."""
    image = read_bgr(path)
    if args.stages:
        stages = stage_results(predictor, image)
        instances = stages[-1]
    else:
        instances = predictor(image)["instances"].to("cpu")
    rgb = image[:, :, ::-1]
    threshold = args.confidence_threshold
    picture = draw_predictions(rgb, instances, predictor.metadata, threshold)
    Image.fromarray(picture).save(stem + ".png")
    if args.stages:
        picture = draw_stages(rgb, stages, predictor.metadata, threshold)
        Image.fromarray(picture).save(stem + "_stages.png")
    return instances[instances.scores >= threshold]


def build_predictor(args) -> Predictor:
    """By the config file, or by the config inside the weights; data sets need not be there.

    Raises:
        UserError: neither is given, or see `Predictor`.
    """
    unused = [x for x in (args.config_file, args.device, *args.register, *args.opts) if x]
    exported = choose_engine(args.weights, args.engine, unused)
    if exported is not None:
        return exported
    if args.config_file:
        experiment = build_experiment(args.config_file, args.opts, args.register, with_data=False)
        return Predictor(experiment, weights=args.weights, device=args.device)
    if not args.weights:
        raise UserError("nothing to predict with: give --weights, --config-file or both")
    return Predictor.from_weights(args.weights, args.opts, device=args.device)


def run(args) -> int:
    """All images; returns 1 if any could not be read."""
    check_score("--confidence-threshold", args.confidence_threshold)
    paths = expand_inputs(args.input)
    stems = name_outputs(paths, args.output)
    load_projects()
    predictor = build_predictor(args)
    if args.stages and not hasattr(predictor.model, "inference_stages"):
        raise UserError(
            f"--stages: {type(predictor.model).__name__} has no results per "
            "stage; use it with a multi-stage model such as HTC"
        )
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be made: {error.strerror}") from error
    results, failed = [], 0
    for image_id, (path, stem) in enumerate(
        zip(tqdm(paths, unit="img", disable=None, leave=False), stems), start=1
    ):
        try:
            instances = process(predictor, path, stem, args)
        except UserError as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
            continue
        results += coco_results(instances, image_id, path, predictor.class_names)
        count = len(instances)
        text = f"{path} -> {stem}.png: {count} instance{'' if count == 1 else 's'}"
        tqdm.write(f"{text}\n{found_table(instances, predictor.class_names)}\n" if count else text)
    with open(os.path.join(args.output, "predictions.json"), "w", encoding="utf-8") as f:
        json.dump(results, f)
    done = len(paths) - failed
    print(f"{done} of {len(paths)} images, {len(results)} instances in {args.output}")
    return 1 if failed else 0


def main(argv=None) -> int:
    parser = argument_parser()
    args = parser.parse_intermixed_args(argv)
    # `--input a.jpg KEY=VALUE`: an override right after the images is not an image.
    is_override = {x for x in args.input if "=" in x and not os.path.exists(x)}
    args.opts += [x for x in args.input if x in is_override]
    args.input = [x for x in args.input if x not in is_override]
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    with torch.no_grad():
        return run_guarded(lambda: run(args))
