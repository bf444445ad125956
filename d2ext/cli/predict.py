"""Images in, results out, for any config: draws the instances a model finds, prints them as a
table and writes them to predictions.json in the style of COCO results, or to other formats."""

import argparse
import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from tabulate import tabulate
from tqdm import tqdm

from d2ext.config import find_config, load_projects
from d2ext.engine import Predictor, build_experiment
from d2ext.engine.cli import check_score, run_guarded
from d2ext.engine.onnx_predictor import ENGINES, choose_engine
from d2ext.errors import UserError
from d2ext.inference import ImageRecord, Prediction, Source, open_source
from d2ext.inference.results import ImageResult, image_result
from d2ext.inference.writers import FORMATS, Writer, build_writers
from d2ext.inference.writers.files import save_picture
from d2ext.visualization import PictureStems, draw_stages, picture_stems

_TABLE_ROWS = 25
_EPILOG = """
examples:
  %(prog)s --weights model.pth --input photo.jpg --output output/pictures
  %(prog)s --config-file mask_rcnn_tiny --weights model.pth \\
           --input photo.jpg 'holiday/*.jpg' --output output/pictures
  %(prog)s --weights model.onnx --input photo.jpg --output output/pictures
  %(prog)s --config-file projects/HTC/configs/htc_tiny.yaml --weights model.pth --input photos/ \\
           --stages --confidence-threshold 0.3 MODEL.ROI_HEADS.NMS_THRESH_TEST=0.4
  %(prog)s --weights model.pth --input clip.mp4 --output output/clip --write video parquet
  %(prog)s --weights model.pth --input photos.txt --output output/labels --write labelme \\
           --batch-size 8 --workers 4 --quiet

formats of --write:
"""


def _formats() -> str:
    return "\n".join(f"  {name:<15}{text}" for name, text in FORMATS.items())


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG + _formats(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where results go")
    parser.add_argument(
        "--write",
        nargs="+",
        choices=list(FORMATS),
        default=["pictures", "results"],
        metavar="FORMAT",
        help=f"any of {', '.join(FORMATS)}; see below (default: pictures results)",
    )
    parser.add_argument(
        "--stages", action="store_true", help="also draw the result after each stage of a cascade"
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="stop after so many")
    parser.add_argument(
        "--quiet", action="store_true", help="no table for each image; a bar in a terminal"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser


def add_model_options(parser: argparse.ArgumentParser, clusters: tuple[str, ...] = ()) -> None:
    """What is predicted with which model, and how: options of every command that predicts.

    Args:
        clusters: what else than this process can compute.
    """
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help=".yaml or .py config, or the name of a shipped one (default: the one that the weights "
        "were trained with)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint (default: the config's), or a file of ONNX that d2ext export wrote",
    )
    parser.add_argument(
        "--engine",
        choices=(*ENGINES, *clusters),
        help="what computes (default: onnxruntime for files of ONNX, else torch)"
        + "".join(f"; {name}: the actors of a cluster" for name in clusters),
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="IMAGE",
        help="image files, folders, quoted patterns such as 'photos/*.jpg', .txt with one per "
        "line, COCO's .json, .tar, addresses of these (http, s3, ...); d2ext predict also takes "
        "one video or webcam:0",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="of a COCO file (default: images beside it)"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is shown and written (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the config's)")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images of one size that are computed together (default: 8 on a GPU, else 1)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images (default: up to 4 with a GPU, else none)",
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=ANN.json,IMAGES",
        help="a data set that the config names, for names of classes that the weights come without "
        "(may be repeated)",
    )


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


def stage_results(predictor: Predictor, image) -> list:
    """The instances after each stage; the last ones are the model's final result."""
    stages = predictor.model.inference_stages([predictor.prepare(image)])
    return [outputs[0]["instances"].to("cpu") for outputs in stages]


def build_predictor(args) -> Predictor:
    """By the config file, or by the config inside the weights; data sets need not be there.

    Raises:
        UserError: neither is given, or see `Predictor`.
    """
    unused = [x for x in (args.config_file, args.device, *args.register, *args.opts) if x]
    engine = args.engine if args.engine in ENGINES else None  # a cluster has either
    exported = choose_engine(args.weights, engine, unused)
    if exported is not None:
        return exported
    if args.config_file:
        path = find_config(args.config_file)
        experiment = build_experiment(path, args.opts, args.register, with_data=False)
        return Predictor(experiment, weights=args.weights, device=args.device)
    if not args.weights:
        raise UserError("nothing to predict with: give --weights, --config-file or both")
    return Predictor.from_weights(args.weights, args.opts, device=args.device)


def staged_predictions(
    predictor: Predictor, records, folder: str, threshold: float
) -> Iterator[Prediction]:
    """The last of the results of all stages for each image, whose stages are drawn."""
    stems = PictureStems()
    for record in records:
        stem = stems.following(record.name)
        try:
            image = record.read()
            stages = stage_results(predictor, image)
        except UserError as error:
            yield Prediction(record, error=str(error))
            continue
        picture = draw_stages(image[:, :, ::-1], stages, predictor.metadata, threshold)
        save_picture(picture, os.path.join(folder, f"{stem}_stages.png"))
        yield Prediction(record, {"instances": stages[-1]}, image)


def _predictions(args, predictor: Predictor, records, keep_images: bool) -> Iterator[Prediction]:
    if args.stages:
        threshold = args.confidence_threshold
        return staged_predictions(predictor, records, args.output, threshold)
    return predictor.predict_records(records, args.batch_size, args.workers, keep_images)


def _limited(source: Source, most: int | None) -> Iterator[ImageRecord]:
    """The first images of a source. Ctrl-C ends one without end, such as a webcam, with all results
    of what was read before."""
    if source.total is not None:
        yield from itertools.islice(source.records, most)
        return
    interrupted: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        for record in itertools.islice(source.records, most):
            yield record
            if interrupted:
                return
    finally:
        signal.signal(signal.SIGINT, previous)


def _said(result: ImageResult, names: list[str], folder: str, drawn: bool) -> str:
    """What is printed of an image."""
    count = len(result.instances)
    target = f" -> {os.path.join(folder, result.stem)}.png" if drawn else ""
    text = f"{result.record.name}{target}: {count} instance{'' if count == 1 else 's'}"
    return f"{text}\n{found_table(result.instances, names)}\n" if count else text


def write_all(args, predictor: Predictor, source: Source, writers: list[Writer]) -> int:
    """Predict and write; the number of images that could not be predicted."""
    keep_images = any(writer.needs_image for writer in writers)
    records = _limited(source, args.max_images)
    total = source.total if args.max_images is None else min(args.max_images, source.total or 0)
    bar = tqdm(total=total or None, unit="img", disable=None, leave=False)
    stems, started = PictureStems(), time.monotonic()
    done = failed = found = 0
    for prediction in _predictions(args, predictor, records, keep_images):
        bar.update()
        done += 1
        stem = stems.following(prediction.record.name)
        error = prediction.error
        if error is None:
            try:
                result = image_result(prediction, stem, args.confidence_threshold)
            except UserError as mistake:
                error = str(mistake)
        if error is not None:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
            continue
        for writer in writers:
            writer.write(result)
        found += len(result.instances)
        if not args.quiet:
            drawn = "pictures" in args.write
            tqdm.write(_said(result, predictor.class_names, args.output, drawn))
    bar.close()
    for writer in writers:
        writer.close()
    speed = done / max(time.monotonic() - started, 1e-9)
    print(
        f"{done - failed} of {done} images, {found} instances in {args.output} "
        f"({speed:.3g} images/s)"
    )
    return failed


def run(args) -> int:
    """All images; returns 1 if any could not be read."""
    check_score("--confidence-threshold", args.confidence_threshold)
    if args.max_images is not None and args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; predict at least one image")
    source = open_source(args.input, args.images)
    if isinstance(source.records, list) and "pictures" in args.write:
        paths = [r.name if r.span else r.place or r.name for r in source.records]
        name_outputs(paths, args.output)
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
    names, metadata = predictor.class_names, predictor.metadata
    writers = build_writers(args.write, args.output, names, metadata, source)
    return 1 if write_all(args, predictor, source, writers) else 0


def parse(parser: argparse.ArgumentParser, argv) -> argparse.Namespace:
    """Options of a command that predicts.

    `--input a.jpg KEY=VALUE`: an override right after the images is not an image.
    """
    args = parser.parse_intermixed_args(argv)
    is_override = {x for x in args.input if "=" in x and not os.path.exists(x) and "://" not in x}
    args.opts += [x for x in args.input if x in is_override]
    args.input = [x for x in args.input if x not in is_override]
    return args


def main(argv=None) -> int:
    args = parse(argument_parser(), argv)
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    with torch.no_grad():
        return run_guarded(lambda: run(args))
