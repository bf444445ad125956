"""Models that are known: what they find is the truth of a generated data set, moved and mixed."""

import numpy as np
import pycocotools.mask as mask_util

from d2ext.evaluation.predictions import ImageDetections
from d2ext.report import Entry, Speed
from d2ext.report.sources import load_truth


def moved(rle, by, size):
    """A mask moved to the right and down."""
    mask = mask_util.decode(rle)
    result = np.zeros(size, np.uint8, order="F")
    result[by:, by:] = mask[: size[0] - by, : size[1] - by]
    return mask_util.encode(result)


def make_entry(name, truth, seed=0, shift=2, lost=0.2, wrong=0.1, stages=0, **values):
    """A model that moves what it finds by up to `shift` pixels, does not find the part `lost` and
    takes the part `wrong` for another class."""
    per_stage = [
        _found(truth, np.random.default_rng(seed), shift + 3 * max(stages - 1 - k, 0), lost, wrong)
        for k in range(max(stages, 1))
    ]
    values.setdefault("speed", Speed(0.0123, 300 << 20, "CPU, 1 thread"))
    staged = per_stage if stages else ()
    return Entry(name, per_stage[-1], staged, 3_000_000, **values)


def _found(truth, rng, shift, lost, wrong):
    detections = []
    for image in truth.images:
        masks, scores, classes = [], [], []
        for annotation in image.annotations:
            draws = rng.random(3)
            by = int(rng.integers(0, shift + 1))
            if annotation["iscrowd"] or draws[0] < lost:
                continue
            mask = moved(truth.rle(image, annotation), by, image.size)
            if not mask_util.area(mask):
                continue
            label = annotation["label"]
            if draws[1] < wrong:
                label = (label + 1) % len(truth.class_names)
            masks.append(mask)
            scores.append(0.3 + 0.7 * draws[2])
            classes.append(label)
        if not masks:
            detections.append(None)
            continue
        boxes = np.stack([mask_util.toBbox(mask) for mask in masks])
        boxes[:, 2:] += boxes[:, :2]
        detections.append(
            ImageDetections(
                image.image_id,
                tuple(image.size),
                boxes.astype(np.float32),
                np.array(scores, np.float32),
                np.array(classes, np.int64),
                [mask["counts"] for mask in masks],
            )
        )
    return detections


def make_models(name):
    """Records, truth, and three models of a registered data set: a good one, a cascade with runs
    to show, and one without anything but predictions."""
    records, truth = load_truth(name)
    curve = [{"iteration": i, "total_loss": 4.0 / (1 + i / 20)} for i in range(0, 100, 5)]
    curve += [{"iteration": i, "segm/AP": 10.0 + i / 5} for i in (49, 99)]
    return (
        records,
        truth,
        [
            make_entry("good & <fast>", truth, 1, shift=1, about="Finds <most> things."),
            make_entry("cascade", truth, 2, stages=3, curve=curve, command="d2ext train cascade"),
            make_entry("weak", truth, 3, shift=5, lost=0.5, wrong=0.4, speed=None),
        ],
    )
