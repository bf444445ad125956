"""Small scenes for tests of measures: objects and detections as dictionaries with a box (x, y,
width, height), a label, and a mask that is the box without a square of `cut` pixels in a corner."""

import numpy as np
import pycocotools.mask as mask_util

from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections


def mask_of(shape, size):
    x, y, width, height = shape["box"]
    mask = np.zeros(size, np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    cut = shape.get("cut", 0)
    if cut:
        mask[y + height - cut : y + height, x + width - cut : x + width] = 0
    return mask_util.encode(mask)


def make_truth(images, size, names):
    """The ground truth of images, each a list of objects."""
    return GroundTruth(
        [
            TruthImage(
                number,
                tuple(size),
                [
                    {
                        "label": shape["label"],
                        "bbox": [float(v) for v in shape["box"]],
                        "area": float(shape["box"][2] * shape["box"][3]),
                        "iscrowd": shape.get("crowd", 0),
                        "segmentation": mask_of(shape, size),
                    }
                    for shape in objects
                ],
            )
            for number, objects in enumerate(images)
        ],
        list(names),
        list(range(1, len(names) + 1)),
    )


def make_detections(number, shapes, size, with_masks=True):
    """What was found in one image."""
    boxes = np.array([shape["box"] for shape in shapes], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return ImageDetections(
        number,
        tuple(size),
        boxes,
        np.array([shape["score"] for shape in shapes], dtype=np.float32),
        np.array([shape["label"] for shape in shapes], dtype=np.int64),
        [mask_of(shape, size)["counts"] for shape in shapes] if with_masks else None,
    )
