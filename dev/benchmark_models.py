#!/usr/bin/env python
"""Time whole networks: training step, inference, mapper, pasting and evaluation.

    python dev/benchmark_models.py --size 800,1333 --output docs/benchmarks/models_cpu
    python dev/benchmark_models.py --tasks inference --models cascade,htc
    python dev/benchmark_models.py --device cuda --amp --images 4 --rounds 5

Every network of the collection in full size (R-50, 80 classes), beside torchvision's
`maskrcnn_resnet50_fpn`, in one process and in turns; detectron2's Mask R-CNN and Cascade are its
own classes. A training step is forward and backward pass, without the optimizer. Weights are
random, except that regions are anchors and one class gets the scores. On one CPU thread times are
those of the process. The floor is the longer one of the operations at the speed of a matrix
product, and of the bytes of all convolutions and linear layers at the speed of a copy.
"""

import argparse
import json
import statistics
import sys
import tempfile

import mapper_cases
import numpy as np
import torch
import torchvision
from machine import copy_bandwidth, describe, peak_gflops, seconds
from model_parts import PARTS, PartTimer, count_work
from tabulate import tabulate

from d2ext.config import load_projects
from d2ext.engine import build_experiment
from d2ext.ops import paste_masks
from d2ext.utils.testing import random_batch

from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.utils.events import EventStorage

CONFIGS = {
    "mask_rcnn": "configs/mask_rcnn_R_50_FPN_1x_coco.yaml",
    "cascade": "configs/cascade_mask_rcnn_R_50_FPN_1x_coco.yaml",
    "htc_without_semantic": "projects/HTC/configs/htc_without_semantic_R_50_FPN_1x_coco.yaml",
    "htc": "projects/HTC/configs/htc_R_50_FPN_1x_coco.yaml",
    "mnc": "projects/MNC/configs/mnc_R_50_C4_coco.yaml",
    "fcis": "projects/FCIS/configs/fcis_R_50_coco.yaml",
}
TINY = {
    "mask_rcnn": "configs/mask_rcnn_tiny.yaml",
    "cascade": "configs/cascade_mask_rcnn_tiny.yaml",
    "htc": "projects/HTC/configs/htc_tiny.yaml",
    "mnc": "projects/MNC/configs/mnc_tiny.yaml",
    "fcis": "projects/FCIS/configs/fcis_tiny.yaml",
}
TORCHVISION = "torchvision"
# Without these all boxes are anchors, so that every network has the regions and detections that it
# is configured for; random ones would throw most boxes out of the image.
PREDICTED = ("anchor_deltas.weight", "bbox_pred.weight", "cls_score.weight", "cls_score.bias")
TASKS = ("inference", "training", "mapper", "paste", "evaluation")


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--models", default=",".join([*CONFIGS, TORCHVISION]))
    parser.add_argument("--tiny", action="store_true", help="the tiny configs, for a quick look")
    parser.add_argument("--size", default="480,640", help="height,width of the images in pixels")
    parser.add_argument("--images", type=int, default=1, help="of one step")
    parser.add_argument("--objects", type=int, default=8, help="of one image")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--note", default="", help="a line about the machine, for the report")
    parser.add_argument("--output", help="write PATH.md and PATH.json")
    args = parser.parse_args(arguments)
    args.size = tuple(int(x) for x in args.size.split(","))
    args.tasks, args.models = args.tasks.split(","), args.models.split(",")
    known = TINY if args.tiny else CONFIGS
    for names, allowed in ((args.tasks, TASKS), (args.models, (*known, TORCHVISION))):
        if not set(names) <= set(allowed):
            parser.error(f"unknown: {', '.join(set(names) - set(allowed))}; known: {allowed}")
    return args


# ------------------------------------------------------------------ networks
def build(name: str, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == TORCHVISION:
        sides = {"min_size": min(args.size), "max_size": max(args.size)}
        model = torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=81, **sides
        )
    else:
        config = (TINY if args.tiny else CONFIGS)[name]
        experiment = build_experiment(config, ["MODEL.WEIGHTS="], with_data=False)
        experiment.set_device(args.device)
        model = experiment.build_model()
    for key, parameter in model.named_parameters():
        if key.endswith(PREDICTED):
            torch.nn.init.zeros_(parameter)
        if key.endswith("cls_score.bias"):
            # A class and background, at whatever end it is, get the scores.
            parameter.data[[0, 1, -1] if name == TORCHVISION else [0, -1]] = 3.0
    return model.to(args.device)


def inputs_of(name: str, model: torch.nn.Module, args: argparse.Namespace, train: bool) -> tuple:
    classes = 3 if args.tiny else 80
    batch = random_batch(args.images, args.size, args.objects, classes)
    if name != TORCHVISION:
        return (batch,)
    images = [x["image"].float().div(255).to(args.device) for x in batch]
    if not train:
        return (images,)
    targets = [
        {
            "boxes": x["instances"].gt_boxes.tensor.to(args.device),
            "labels": x["instances"].gt_classes.to(args.device) + 1,
            "masks": x["instances"].gt_masks.tensor.to(args.device, torch.uint8),
        }
        for x in batch
    ]
    return images, targets


class Network:
    """A network with the inputs of one task, and what its steps took."""

    def __init__(self, name, task, args):
        self.name, self.args, self.train = name, args, task == "training"
        self.model = build(name, args).train(self.train)
        self.inputs = inputs_of(name, self.model, args, self.train)
        self.found = ""
        self.times, self.parts = [], []
        self.gflop, self.megabytes = count_work(self.model, self.step)
        self.timer = PartTimer(self.model, torch.device(args.device))

    def forward(self):
        with EventStorage(), torch.autocast(self.args.device, enabled=self.args.amp):
            return self.model(*self.inputs)

    def step(self):
        if not self.train:
            with torch.no_grad():
                out = self.forward()
            result = out[0]
            self.found = len(result["boxes"] if "boxes" in result else result["instances"])
            return
        losses = self.forward()
        self.backward(sum(losses.values()))

    def backward(self, loss):
        loss.backward()
        self.model.zero_grad()

    def measure(self):
        if not self.train:
            whole, parts = self.timer.run(self.step)
        else:
            kept = []
            device = torch.device(self.args.device)
            forward, parts = self.timer.run(lambda: kept.append(sum(self.forward().values())))
            backward = seconds(lambda: self.backward(kept.pop()), device)
            whole, parts = forward + backward, {**parts, "backward": backward}
        self.times.append(whole)
        self.parts.append(parts)


def networks(task: str, args: argparse.Namespace, floors: tuple[float, float]) -> list[dict]:
    """One row per network, measured in turns. They are built one after the other and all kept."""
    cases = []
    for name in args.models:
        print(f"# {task}: {name}", file=sys.stderr, flush=True)
        cases.append(Network(name, task, args))
    for _ in range(args.rounds):
        for case in cases:
            case.measure()
    gflops, bandwidth = floors
    rows = []
    for case in cases:
        whole = statistics.median(case.times)
        middle = case.parts[case.times.index(sorted(case.times)[len(case.times) // 2])]
        # The backward pass moves everything twice more: for inputs and for weights.
        moved = case.megabytes * (3 if case.train else 1)
        floor = max(case.gflop / gflops, moved / 1e3 / bandwidth)
        names = (*PARTS, "backward") if case.train else PARTS
        row = {"task": task, "network": case.name, "ms": whole * 1e3, "detections": case.found}
        row.update({f"{n} ms": middle.get(n, 0.0) * 1e3 for n in names})
        row.update({"GFLOP": case.gflop, "MB": moved, "floor ms": floor * 1e3})
        row["x floor"] = whole / floor
        rows.append(row)
    for row in rows:
        for peer in ("cascade", TORCHVISION):
            base = next((r["ms"] for r in rows if r["network"] == peer), None)
            row[f"of {peer}"] = row["ms"] / base if base else None
    return rows


# ------------------------------------------------------------------ the rest
def in_turns(runs: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, warm and interleaved."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def compared(task: str, case: str, times: dict[str, float], base: str) -> list[dict]:
    return [
        {"task": task, "case": case, "by": n, "ms": t * 1e3, f"speed of {base}": times[base] / t}
        for n, t in times.items()
    ]


def mapper(args: argparse.Namespace) -> list[dict]:
    """Images through the mappers, at 800 pixels; the speed is images per second."""
    rows = []
    for objects in (8, 30):
        with tempfile.TemporaryDirectory() as folder:
            runs = mapper_cases.runs(folder, objects)
            times = in_turns(runs, max(args.rounds, 9), torch.device("cpu"))
            loading = mapper_cases.in_a_loading_process(runs, max(args.rounds, 7))
        rows += compared("mapper", f"{objects} objects", times, mapper_cases.BASE)
        case = f"{objects} objects, handed on by one worker"
        rows += compared("mapper", case, loading, mapper_cases.BASE)
    return rows


def paste(args: argparse.Namespace) -> list[dict]:
    """100 masks of 28 x 28 into 800 x 1333, boxes of 32 to 400 pixels."""
    device = torch.device(args.device)
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(100, 28, 28, generator=draw).to(device)
    sides = 32 * (400 / 32) ** torch.rand(100, 2, generator=draw)
    low = torch.rand(100, 2, generator=draw) * (torch.tensor([1333.0, 800.0]) - sides)
    boxes = torch.cat([low, low + sides], dim=1).to(device)
    runs = {
        "detectron2": lambda: paste_masks_in_image(masks, boxes, (800, 1333)),
        "ours": lambda: paste_masks(masks, boxes, (800, 1333)),
    }
    times = in_turns(runs, max(args.rounds, 5), device)
    return compared("paste", "100 masks, 800x1333", times, "detectron2")


def evaluation(args: argparse.Namespace) -> list[dict]:
    """COCO's mask AP of 50 images with 100 detections each."""
    import benchmark_eval as peer

    options = peer.argument_parser().parse_args(["--images", "50"])
    truth, detections = peer.make_data(options, np.random.default_rng(0))
    runs = {
        "pycocotools": lambda: peer.timed(peer.plain_pycocotools, truth, detections, "segm"),
        "ours": lambda: peer.timed(peer.evaluate_coco, truth, detections, "segm"),
    }
    times = in_turns(runs, max(args.rounds, 3), torch.device("cpu"))
    return compared("evaluation", "segm, 50 images", times, "pycocotools")


def main(arguments=None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    load_projects()
    device = torch.device(args.device)
    dtype = torch.float16 if args.amp and device.type == "cuda" else torch.float32
    floors = peak_gflops(device, dtype), copy_bandwidth(device)
    lines = [
        *describe(device),
        f"matrix product {floors[0]:.0f} GFLOP/s, copy {floors[1]:.1f} GB/s",
        f"{args.images} image(s) of {args.size[0]}x{args.size[1]} with {args.objects} objects per"
        f" step, {'AMP' if args.amp else 'fp32'}, median of {args.rounds} round(s), random weights",
        *([args.note] if args.note else []),
    ]
    print("\n".join(lines), flush=True)
    tables, others = {}, {"mapper": mapper, "paste": paste, "evaluation": evaluation}
    for task in args.tasks:
        measure = others.get(task)
        tables[task] = measure(args) if measure else networks(task, args, floors)
        print("\n" + table(tables[task]), flush=True)
    if args.output:
        with open(f"{args.output}.json", "w") as out:
            json.dump({"machine": lines, "tables": tables}, out, indent=1)
            out.write("\n")
        with open(f"{args.output}.md", "w") as out:
            out.write("\n".join(f"- {line}" for line in lines) + "\n")
            for rows in tables.values():
                out.write(f"\n{table(rows)}\n")
    return 0


def table(rows: list[dict]) -> str:
    short = [{k: _cell(v) for k, v in row.items()} for row in rows]
    return tabulate(short, headers="keys", tablefmt="github", disable_numparse=True)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
