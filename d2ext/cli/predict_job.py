"""Predict a million images: a job that several processes share, and that the same command continues
after an interruption. Started by torchrun, each process has a GPU of its own and its own shards.

The folder gets parts/*.parquet with a row per image and, when the last shard is done, coco.json
with all detections and failed.json with the images that could not be predicted.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import logging
import os
import sys
import time
import warnings

import torch
from tqdm import tqdm

from d2ext.cli.predict import add_model_options, build_predictor, parse
from d2ext.config import load_projects
from d2ext.engine import Predictor
from d2ext.engine.cli import check_score, run_guarded
from d2ext.engine.launch import end_with_launcher, started_by_torchrun
from d2ext.engine.onnx_predictor import OnnxPredictor
from d2ext.engine.provenance import absolute_register, config_to_store, portable_copy
from d2ext.errors import UserError
from d2ext.inference.job import Job, run_shards
from d2ext.inference.ray_engine import require_ray
from d2ext.inference.sources import find_images
from d2ext.inference.table import require_pyarrow

from detectron2.utils.file_io import PathManager

_EPILOG = """
examples:
  one process      %(prog)s --weights model.pth --input photos/ --output output/job
  4 GPUs           torchrun --nproc-per-node=4 tools/predict.py --weights model.pth \\
                       --input photos.txt --output output/job
  a Ray cluster    %(prog)s --weights model.pth --input photos.txt --output output/job \\
                       --engine ray --address auto --actors 8
  tar files on S3  %(prog)s --weights model.pth --input 's3://bucket/shard-*.tar' \\
                       --output s3://bucket/predictions
The same command continues a job; failed images are tried again with --retry-failed.
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser, clusters=("ray",))
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="of the job, here or an address"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="IMAGES",
        help="how many are lost at most by an interruption, per process (default: 500)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="compute shards again that have images that could not be predicted",
    )
    parser.add_argument(
        "--polygons", action="store_true", help="masks in coco.json as polygons, not as codes"
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the Ray cluster; auto: the one that this machine is part of (default: a new one "
        "on this machine)",
    )
    parser.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="models on the Ray cluster at once (default: one per GPU, or one)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser


def process_numbers() -> tuple[int, int]:
    """Number of this process among those of torchrun or Slurm's like, and how many there are.

    Raises:
        UserError: RANK and WORLD_SIZE do not fit.
    """
    try:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, size = 0, 0
    if not 0 <= rank < size:
        raise UserError(
            f"RANK is {os.environ.get('RANK')} and WORLD_SIZE {os.environ.get('WORLD_SIZE')}; "
            "they number processes from 0, as torchrun sets them"
        )
    return rank, size


def settings_of(predictor: Predictor, threshold: float) -> dict:
    """What a job is bound to beside its images, see `Job`."""
    text = ""  # a file of ONNX has its settings inside
    if not isinstance(predictor, OnnxPredictor):
        experiment = portable_copy(predictor.experiment)
        experiment.set_device("cpu")
        experiment.set_paths(os.sep, "")
        experiment.set_registered([])
        text = config_to_store(experiment)
    digest = hashlib.sha256()
    with PathManager.open(predictor.weights, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return {
        "weights": digest.hexdigest(),
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "threshold": threshold,
    }


class Report:
    """A bar in a terminal; elsewhere a line per shard, with images/s and the time left."""

    def __init__(self, job: Job, shards: list[int], rank: int):
        self._total = sum(len(job.shard(i)) for i in shards)
        self._rank, self._done, self._shards = rank, 0, len(shards)
        self._bar = tqdm(total=self._total, unit="img", disable=None if rank == 0 else True)
        self._finished, self._started = 0, time.monotonic()

    def images(self, predictions):
        """The same predictions, counted; reasons of failures on stderr."""
        for prediction in predictions:
            if prediction.error is not None:
                tqdm.write(f"error: {prediction.error}", file=sys.stderr)
            self._bar.update()
            yield prediction

    def from_afar(self, index: int, rows: list[dict]) -> None:
        """A shard whose images other processes have predicted."""
        for row in rows:
            if row["error"] is not None:
                tqdm.write(f"error: {row['error']}", file=sys.stderr)
        self._bar.update(len(rows))
        self.shard(index, rows)

    def shard(self, index: int, rows: list[dict]) -> None:
        self._done, self._finished = self._done + len(rows), self._finished + 1
        speed = self.speed()
        left = datetime.timedelta(seconds=round((self._total - self._done) / speed))
        if self._bar.disable:
            print(
                f"process {self._rank}: {self._finished} of {self._shards} shards, "
                f"{self._done} of {self._total} images, {speed:.1f} images/s, {left} left",
                flush=True,
            )

    def speed(self) -> float:
        return self._done / max(time.monotonic() - self._started, 1e-9)

    def close(self) -> None:
        self._bar.close()


def _compute(args, predictor: Predictor, job: Job, rank: int, size: int) -> None:
    shards = job.unfinished(rank, size, args.retry_failed)
    mine = len(range(rank, len(job), size))
    if len(shards) < mine:
        print(f"process {rank}: {mine - len(shards)} of {mine} shards are there", flush=True)
    report = Report(job, shards, rank)

    def predict(records):
        return report.images(predictor.predict_records(records, args.batch_size, args.workers))

    with contextlib.closing(report):
        run_shards(job, shards, predict, report.shard)


def make_model(args):
    """The model of an actor on a cluster."""
    warnings.filterwarnings("ignore", "torch.meshgrid")
    load_projects()
    return build_predictor(args).model


def _compute_on_ray(args, predictor: Predictor, job: Job, device: str | None) -> None:
    from d2ext.inference.ray_engine import connect, run_on_ray

    if args.actors is not None and args.actors < 1:
        raise UserError(f"--actors is {args.actors}; at least one model has to predict")
    ray = connect(args.address)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = device or ("cuda" if gpus else "cpu")
    on_gpu = device.startswith("cuda")
    there = argparse.Namespace(**{**vars(args), "device": device})
    there.register = [absolute_register(text) for text in args.register]
    for name in ("config_file", "weights"):
        path = getattr(args, name)
        setattr(there, name, os.path.abspath(path) if path and os.path.exists(path) else path)
    shards = job.unfinished(retry_failed=args.retry_failed)
    report = Report(job, shards, 0)
    with contextlib.closing(report):
        run_on_ray(
            job,
            shards,
            predictor.preparation,
            functools.partial(make_model, there),
            args.address,
            args.actors or max(gpus if on_gpu else 1, 1),
            1.0 if on_gpu else 0.0,
            args.batch_size or (8 if on_gpu else 1),
            report.from_afar,
        )


def run(args) -> int:
    """This process's part of the job; whoever finds all parts there merges them."""
    check_score("--confidence-threshold", args.confidence_threshold)
    require_pyarrow()
    if started_by_torchrun():
        end_with_launcher()
    rank, size = (0, 1) if args.engine == "ray" else process_numbers()
    source = find_images(args.input, args.images)
    device = args.device
    if args.engine == "ray":
        require_ray()
        args.device = "cpu"  # of this process; the actors have the GPUs
    elif torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local % torch.cuda.device_count())
    load_projects()
    predictor = build_predictor(args)
    settings = settings_of(predictor, args.confidence_threshold)
    job = Job(args.output, source, predictor.class_names, settings, args.shard_size)
    if args.engine == "ray":
        _compute_on_ray(args, predictor, job, device)
    else:
        _compute(args, predictor, job, rank, size)
    missing = len(job.unfinished())
    if missing:
        print(f"process {rank} is done; {missing} of {len(job)} shards are not", flush=True)
        return 0
    merged = job.merge(args.polygons)
    print(
        f"{len(job.records)} images: {merged.images} predicted, {merged.failed} failed, "
        f"{merged.detections} detections in {args.output}",
        flush=True,
    )
    if not merged.images:
        raise UserError(f"none of {merged.failed} images could be predicted; see failed.json")
    return 0


def main(argv=None) -> int:
    args = parse(argument_parser(), argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    return run_guarded(lambda: run(args))
