#!/usr/bin/env python
"""Export networks to ONNX and compare onnxruntime with PyTorch on the same images, in one run:
detections, boxes, scores, masks, and how long an image takes.

    python dev/compare_engines.py output/demo/*_tiny --images datasets/shapes/val/images

Whether a box suppresses another, or a pixel belongs to a mask, is decided at thresholds, and no two
engines round alike. A detection that differs counts as decided by rounding only where PyTorch
itself decides either way when the last bits of its layers' results are moved; see `moved_rounding`.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from d2ext.config import load_projects
from d2ext.engine.exporting import export_model
from d2ext.engine.onnx_predictor import OnnxModel
from d2ext.report.sources import build_source_predictor, parse_source

from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances

_HEADERS = (
    "network", "standard operators", "images", "detections", "without partner", "box, px", "score",
    "mask IoU", "differing", "by rounding", "PyTorch with itself", "PyTorch, ms (CPU)",
    "onnxruntime, ms (CPU)",
)  # fmt: skip
# How partners may differ: boxes in pixels, scores, IoU of masks.
BOX, SCORE, IOU = 1e-3, 1e-4, 0.999
# Units in the last place by which results of layers are moved. Two change the score maps of FCIS by
# 1.3e-6 on average; onnxruntime changes them by 1.2e-6, and so does PyTorch without oneDNN.
UNITS = 2
# A threshold within twice that is near; runs that look for one.
NEAR, RUNS = 2 * UNITS, 50


class Agreement(NamedTuple):
    """How the detections of one image agree.

    Attributes:
        wanted: number of detections of PyTorch.
        missing, extra: of these without a partner, and the other way round.
        box, score: largest difference between partners, in pixels of the image.
        iou: the least of a single mask.
        overlap: IoU of all masks together, counted mask by mask.
        lost, foreign: rows of both without a partner that is as near as `BOX`, `SCORE` and `IOU`
            say.
    """

    wanted: int
    missing: int
    extra: int
    box: float
    score: float
    iou: float
    overlap: float
    lost: frozenset[int]
    foreign: frozenset[int]

    @property
    def differing(self) -> int:
        """Detections without a partner, and pairs too far apart."""
        return len(self.lost) + self.extra


def agreement(found: Instances, wanted: Instances) -> Agreement:
    """Pair detections of one class, the nearest boxes first; partners lie within a pixel."""
    used, boxes, scores, ious = set(), [0.0], [0.0], [1.0]
    lost, near = set(), set()
    both, either = 0, 0
    distance = (wanted.pred_boxes.tensor[:, None] - found.pred_boxes.tensor[None]).abs().amax(2)
    distance[wanted.pred_classes[:, None] != found.pred_classes[None]] = torch.inf
    # Boxes of two detections may be equal, where many regions vote for one mask: their scores tell.
    cost = distance + (wanted.scores[:, None] - found.scores[None]).abs()
    for row in range(len(wanted)):
        free = [i for i in cost[row].argsort().tolist() if i not in used]
        if not free or not distance[row, free[0]] < 1:
            lost.add(row)
            continue
        partner = free[0]
        used.add(partner)
        boxes.append(float(distance[row, partner]))
        scores.append(float((wanted.scores[row] - found.scores[partner]).abs()))
        own, other = wanted.pred_masks[row], found.pred_masks[partner]
        shared, union = int((own & other).sum()), int((own | other).sum())
        both, either = both + shared, either + union
        ious.append(shared / union if union else 1.0)
        if boxes[-1] <= BOX and scores[-1] <= SCORE and ious[-1] >= IOU:
            near.add(partner)
        else:
            lost.add(row)
    missing, extra = len(wanted) - len(used), len(found) - len(used)
    overlap = both / either if either else 1.0
    foreign = frozenset(range(len(found))) - near
    worst = max(boxes), max(scores), min(ious), overlap
    return Agreement(len(wanted), missing, extra, *worst, frozenset(lost), foreign)


@contextlib.contextmanager
def moved_rounding(model: nn.Module, seed: int, units: float) -> Iterator[None]:
    """Within, every layer multiplies its results by random factors that move them by at most
    `units` in the last place of float32, as another order of its sums would."""
    generator = torch.Generator().manual_seed(seed)

    def move(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        noise = 2 * torch.rand(output.shape, generator=generator) - 1
        return output * (1 + noise * (units * torch.finfo(torch.float32).eps))

    layers = [x for x in model.modules() if not any(True for _ in x.children())]
    handles = [layer.register_forward_hook(move) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Unexplained(NamedTuple):
    """Differing detections that rounding does not explain.

    Attributes:
        lost: rows of PyTorch's that it has in all runs with moved rounding, too.
        foreign: rows of the other engine's that no such run has.
        runs: how many there were.
    """

    lost: set[int]
    foreign: set[int]
    runs: int


@torch.no_grad()
def unexplained(
    model: nn.Module, x: dict, found: Instances, wanted: Instances, most: int = RUNS
) -> Unexplained:
    """Let PyTorch's model, which found `wanted` in the input `x`, predict with moved rounding until
    it has decided each differing detection both ways, or `most` times."""
    result = agreement(found, wanted)
    lost, foreign, runs = set(result.lost), set(result.foreign), 0
    while (lost or foreign) and runs < most:
        with moved_rounding(model, runs, NEAR):
            again = model([x])[0]["instances"]
        lost -= agreement(again, wanted).lost
        foreign &= agreement(found, again).foreign
        runs += 1
    return Unexplained(lost, foreign, runs)


class Comparison(NamedTuple):
    """Of one network on all images: counts, the worst of `Agreement`, and medians in seconds, of
    the clock and of the processor, which other programs hardly change.

    Attributes:
        differing: see `Agreement`.
        unexplained: of these, see the function; of a pair, one may be.
        itself: differing detections of PyTorch with rounding moved by `UNITS`, one run per image.
    """

    images: int
    detections: int
    missing: int
    extra: int
    differing: int
    box: float
    score: float
    iou: float
    overlap: float
    unexplained: int
    itself: int
    torch_seconds: float
    onnx_seconds: float
    torch_cpu: float
    onnx_cpu: float


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
def compare(model: nn.Module, exported: Any, inputs: Sequence[dict]) -> Comparison:
    """Run both on the same inputs, one after the other; what differs goes to the standard error."""
    results, seconds, left, itself = [], [], 0, 0
    for number, x in enumerate(inputs):
        begin = _clocks()
        wanted = model([x])[0]["instances"]
        middle = _clocks()
        found = exported([x])[0]["instances"]
        seconds.append(np.concatenate([middle - begin, _clocks() - middle]))
        results.append(agreement(found, wanted))
        with moved_rounding(model, number, UNITS):
            itself += agreement(model([x])[0]["instances"], wanted).differing
        if results[-1].differing:
            rest = unexplained(model, x, found, wanted)
            left += max(len(rest.lost), len(rest.foreign))
            print(f"input {number}: {results[-1]}\n    {rest}", file=sys.stderr)
    names = ("wanted", "missing", "extra", "differing")
    total = [sum(getattr(r, name) for r in results) for name in names]
    worst = [max(r.box for r in results), max(r.score for r in results)]
    worst += [min(r.iou for r in results), min(r.overlap for r in results)]
    times = np.median(np.array(seconds[1:] or seconds), axis=0)[[0, 2, 1, 3]].tolist()
    return Comparison(len(inputs), *total, *worst, left, itself, *times)


def _clocks() -> np.ndarray:
    """Seconds of the clock, and of the processor in this process."""
    return np.array([time.perf_counter(), time.process_time()])


def foreign_operators(path: str) -> list[str]:
    """Operators of a file that are not of ONNX itself."""
    nodes = onnx.load(path).graph.node
    return sorted({f"{x.domain}::{x.op_type}" for x in nodes if x.domain not in ("", "ai.onnx")})


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where a detection differs and rounding does not explain it."""
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
        good &= not (result.unexplained or others)
        row = [
            source.name,
            "no: " + ", ".join(others) if others else "yes",
            result.images,
            result.detections,
            result.missing + result.extra,
            f"{result.box:.1e}",
            f"{result.score:.1e}",
            f"{result.iou:.4f}",
            result.differing,
            result.differing - result.unexplained,
            result.itself,
            f"{result.torch_seconds * 1e3:.0f} ({result.torch_cpu * 1e3:.0f})",
            f"{result.onnx_seconds * 1e3:.0f} ({result.onnx_cpu * 1e3:.0f})",
        ]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
