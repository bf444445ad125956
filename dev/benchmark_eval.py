#!/usr/bin/env python
"""Time the evaluation beside plain pycocotools on the same random detections, and compare results.

    python dev/benchmark_eval.py                              500 images, 100 detections each
    python dev/benchmark_eval.py --images 5732 --classes 20 --only voc_sds        all of SDS val

Objects are ellipses, a fifth of them crowd regions; a third of the detections are objects that were
moved and stretched a little. Exit status 1 when a table differs from pycocotools by more than 1e-6.
"""

import argparse
import contextlib
import io
import platform
import resource
import sys
import time

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from d2ext.evaluation import evaluate_coco, evaluate_mapr
from d2ext.evaluation.coco_scores import CocoTables, default_implementation
from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections, collect, to_coco

SIZE = (375, 500)
SHAPES, VARIANTS = 200, 5  # different objects, and each of them with so many changes


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=["bbox", "segm", "boundary", "voc_sds", "collect"], help="one part"
    )
    return parser


def make_shapes(rng):
    """(SHAPES, VARIANTS) run-length codes."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    codes = []
    for _ in range(SHAPES):
        cy, cx = rng.uniform(0, SIZE[0]), rng.uniform(0, SIZE[1])
        ry, rx = np.exp(rng.uniform(np.log(6), np.log(150), 2))
        variants = []
        for variant in range(VARIANTS):
            f = 0.0 if variant == 0 else 0.15
            dy, dx, sy, sx = 1 + rng.uniform(-f, f, 4)
            u = (y - np.clip(cy * dy, 0, SIZE[0] - 1)) / (ry * sy)
            v = (x - np.clip(cx * dx, 0, SIZE[1] - 1)) / (rx * sx)
            mask = u**2 + v**2 <= 1 + 0.1 * np.sin(7 * np.arctan2(u, v))
            variants.append(mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)))
        codes.append(variants)
    return codes


def make_data(args, rng):
    """(GroundTruth, detections by image) of random objects."""
    codes = make_shapes(rng)
    boxes = np.array([[mask_util.toBbox(c) for c in row] for row in codes])
    images, detections = [], []
    for number in range(1, args.images + 1):
        objects = rng.integers(0, SHAPES, rng.integers(0, 8))
        labels = rng.integers(0, args.classes, len(objects))
        annotations = [
            {
                "bbox": boxes[shape, 0].tolist(),
                "segmentation": codes[shape][0],
                "area": float(mask_util.area(codes[shape][0])),
                "iscrowd": int(rng.random() < 0.2),
                "label": int(label),
            }
            for shape, label in zip(objects, labels)
        ]
        images.append(TruthImage(number, SIZE, annotations))
        shapes = rng.integers(0, SHAPES, args.detections)
        classes = rng.integers(0, args.classes, args.detections)
        if len(objects):
            good = np.flatnonzero(rng.random(args.detections) < 1 / 3)
            chosen = rng.integers(0, len(objects), len(good))
            shapes[good], classes[good] = objects[chosen], labels[chosen]
        variants = rng.integers(0, VARIANTS, args.detections)
        found = boxes[shapes, variants].copy()
        found[:, 2:] += found[:, :2]
        detections.append(
            ImageDetections(
                number,
                SIZE,
                found.astype(np.float32),
                np.round(rng.random(args.detections), 3).astype(np.float32),
                classes,
                # Copies, which take the memory that different masks would.
                [bytes(bytearray(codes[s][v]["counts"])) for s, v in zip(shapes, variants)],
            )
        )
    names = [f"class{i}" for i in range(args.classes)]
    return GroundTruth(images, names, list(range(1, args.classes + 1))), detections


def plain_pycocotools(truth, detections, kind):
    """What people run: pycocotools alone, from a results list to its tables."""
    annotations = [
        {**a, "id": n, "image_id": image.image_id, "category_id": a["label"] + 1}
        for n, (image, a) in enumerate(
            ((image, a) for image in truth.images for a in image.annotations), start=1
        )
    ]
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i.image_id, "height": SIZE[0], "width": SIZE[1]} for i in truth.images],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in enumerate(truth.class_names, start=1)],
    }
    coco.createIndex()
    results = []
    for image in detections:
        for result in to_coco(image, image.image_id, truth.category_ids):
            del result["bbox" if kind == "segm" else "segmentation"]
            results.append(result)
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    return CocoTables(evaluation.eval["precision"], evaluation.eval["recall"])


def timed(function, *arguments):
    """(result, wall seconds, CPU seconds); what it prints is dropped."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = function(*arguments)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def memory() -> float:
    """Peak of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def row(name, implementation, wall, cpu, images, remark=""):
    return [name, implementation, wall, cpu, 1000 * wall / images, remark]


def collecting(args, rng):
    """Encoding the masks of one image, which happens while the model runs."""
    import torch

    from detectron2.structures import Boxes, Instances

    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    instances = Instances(SIZE)
    centres = rng.uniform(0, min(SIZE), (args.detections, 2))
    masks = [(y - a) ** 2 + (x - b) ** 2 < 60**2 for a, b in centres]
    instances.pred_masks = torch.from_numpy(np.array(masks))
    instances.pred_boxes = Boxes(torch.zeros(args.detections, 4))
    instances.scores = torch.rand(args.detections)
    instances.pred_classes = torch.zeros(args.detections, dtype=torch.int64)
    for _ in range(5):
        collect(instances, 1)


def main(argv=None) -> int:
    args = argument_parser().parse_args(argv)
    rng = np.random.default_rng(args.seed)
    truth, detections = make_data(args, rng)
    print(
        f"{args.images} images of {SIZE[1]}x{SIZE[0]}, {args.detections} detections each, "
        f"{sum(len(i.annotations) for i in truth.images)} objects of {args.classes} classes; "
        f"Python {platform.python_version()}, {platform.machine()}; "
        f"data: {memory():.0f} MiB of this process"
    )
    rows, worst = [], 0.0
    if args.only in (None, "collect"):
        _, wall, cpu = timed(collecting, args, rng)
        rows.append(row("collect", "5 images", wall, cpu, 5))
    if args.only in (None, "voc_sds"):
        result, wall, cpu = timed(evaluate_mapr, truth, detections)
        remark = f"mAP^r {100 * result.mean(0.5):.1f} at 0.5; peak {memory():.0f} MiB"
        rows.append(row("voc_sds", "d2ext", wall, cpu, args.images, remark))
    for kind in ("bbox", "segm", "boundary"):
        if args.only not in (None, kind):
            continue
        ours, wall, cpu = timed(evaluate_coco, truth, detections, kind)
        rows.append(row(kind, default_implementation(), wall, cpu, args.images))
        if kind == "boundary":  # pycocotools has none
            continue
        expected, plain_wall, plain_cpu = timed(plain_pycocotools, truth, detections, kind)
        difference = max(float(abs(a - b).max()) for a, b in zip(ours, expected))
        worst = max(worst, difference)
        remark = f"largest difference {difference:.1e}, {plain_cpu / cpu:.1f} times the CPU time"
        rows.append(row(kind, "pycocotools", plain_wall, plain_cpu, args.images, remark))
    headers = ["part", "by", "wall s", "CPU s", "ms per image", ""]
    print(tabulate(rows, headers=headers, floatfmt=".2f"))
    if worst > 1e-6:
        print(f"error: results differ from pycocotools by {worst}", file=sys.stderr)
    return int(worst > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
