#!/usr/bin/env python
"""Export networks to ONNX and compare onnxruntime with PyTorch on the same images, in one run:
detections, boxes, scores, masks, and how long an image takes.

    python dev/compare_engines.py output/demo/*_tiny --images datasets/shapes/val/images
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch

from d2ext.config import load_projects
from d2ext.engine.exporting import export_model
from d2ext.engine.onnx_predictor import OnnxModel
from d2ext.report.sources import build_source_predictor, parse_source

from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances

_HEADERS = (
    "network", "standard operators", "images", "detections", "without partner", "box, px", "score",
    "mask IoU", "PyTorch, ms", "onnxruntime, ms",
)  # fmt: skip


class Agreement(NamedTuple):
    """How the detections of one image agree.

    Attributes:
        wanted: number of detections of PyTorch.
        missing, extra: of these without a partner, and the other way round.
        box, score: largest difference between partners, in pixels of the image.
        iou: the least of a single mask.
        overlap: IoU of all masks together, counted mask by mask.
    """

    wanted: int
    missing: int
    extra: int
    box: float
    score: float
    iou: float
    overlap: float


def agreement(found: Instances, wanted: Instances) -> Agreement:
    """Pair detections of one class, the nearest boxes first; partners lie within a pixel."""
    missing, used, boxes, scores, ious = 0, set(), [0.0], [0.0], [1.0]
    both, either = 0, 0
    distance = (wanted.pred_boxes.tensor[:, None] - found.pred_boxes.tensor[None]).abs().amax(2)
    distance[wanted.pred_classes[:, None] != found.pred_classes[None]] = torch.inf
    # Boxes of two detections may be equal, where many regions vote for one mask: their scores tell.
    cost = distance + (wanted.scores[:, None] - found.scores[None]).abs()
    for row in range(len(wanted)):
        free = [i for i in cost[row].argsort().tolist() if i not in used]
        if not free or not distance[row, free[0]] < 1:
            missing += 1
            continue
        partner = free[0]
        used.add(partner)
        boxes.append(float(distance[row, partner]))
        scores.append(float((wanted.scores[row] - found.scores[partner]).abs()))
        own, other = wanted.pred_masks[row], found.pred_masks[partner]
        shared, union = int((own & other).sum()), int((own | other).sum())
        both, either = both + shared, either + union
        ious.append(shared / union if union else 1.0)
    extra = len(found) - len(used)
    overlap = both / either if either else 1.0
    return Agreement(len(wanted), missing, extra, max(boxes), max(scores), min(ious), overlap)


class Comparison(NamedTuple):
    """Of one network on all images: counts, the worst of `Agreement`, and medians in seconds."""

    images: int
    detections: int
    missing: int
    extra: int
    box: float
    score: float
    iou: float
    overlap: float
    torch_seconds: float
    onnx_seconds: float


def inputs_of(paths: Sequence[str | Path], sizes: Sequence[int], order: str) -> list[dict]:
    """Inputs of models: every image in every size (of its short edge, in pixels)."""
    made = []
    for path in paths:
        image = read_image(str(path), order)
        for size in sizes:
            resized = ResizeShortestEdge([size, size], 4 * size).get_transform(image)
            tensor = torch.from_numpy(
                resized.apply_image(image).astype("float32").transpose(2, 0, 1).copy()
            )
            made.append({"image": tensor, "height": image.shape[0], "width": image.shape[1]})
    return made


@torch.no_grad()
def compare(model: Any, exported: Any, inputs: Sequence[dict]) -> Comparison:
    """Run both on the same inputs, one after the other."""
    results, seconds = [], []
    for x in inputs:
        begin = time.perf_counter()
        wanted = model([x])[0]["instances"]
        middle = time.perf_counter()
        found = exported([x])[0]["instances"]
        seconds.append((middle - begin, time.perf_counter() - middle))
        results.append(agreement(found, wanted))
    total = [sum(getattr(r, name) for r in results) for name in ("wanted", "missing", "extra")]
    worst = [max(r.box for r in results), max(r.score for r in results)]
    times = np.median(np.array(seconds[1:] or seconds), axis=0).tolist()
    worst += [min(r.iou for r in results), min(r.overlap for r in results)]
    return Comparison(len(inputs), *total, *worst, *times)


def foreign_operators(path: str) -> list[str]:
    """Operators of a file that are not of ONNX itself."""
    nodes = onnx.load(path).graph.node
    return sorted({f"{x.domain}::{x.op_type}" for x in nodes if x.domain not in ("", "ai.onnx")})


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where an engine differs by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", help="as for d2ext compare")
    parser.add_argument("--images", required=True, help="folder")
    parser.add_argument("--count", type=int, default=50, help="images (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 200])
    args = parser.parse_args(arguments)
    load_projects()
    paths = sorted(Path(args.images).iterdir())[: args.count]
    print(f"| {' | '.join(_HEADERS)} |\n{'|---' * len(_HEADERS)}|", flush=True)
    good = True
    for source in map(parse_source, args.models):
        predictor, weights = build_source_predictor(source, device="cpu"), source.weights
        inputs = inputs_of(paths, args.sizes, predictor.experiment.image_format)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.onnx"
            export_model(predictor, weights, path)
            result = compare(predictor.model, OnnxModel(path), inputs)
            others = foreign_operators(path)
        good &= not (result.missing or result.extra or others)
        good &= result.box <= 1e-3 and result.score <= 1e-4 and result.iou >= 0.999
        row = [
            source.name,
            "no: " + ", ".join(others) if others else "yes",
            result.images,
            result.detections,
            result.missing + result.extra,
            f"{result.box:.1e}",
            f"{result.score:.1e}",
            f"{result.iou:.4f}",
            f"{result.torch_seconds * 1e3:.0f}",
            f"{result.onnx_seconds * 1e3:.0f}",
        ]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
