"""AP of resampled images, against an evaluation of images that are really there twice."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.evaluation import coco_metrics, evaluate_coco
from d2ext.evaluation.bootstrap import bootstrap_interval, resampled_ap
from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections

SIZE = (40, 50)


def mask_of(box):
    mask = np.zeros(SIZE, np.uint8, order="F")
    x0, y0, x1, y1 = map(int, box)
    mask[y0:y1, x0:x1] = 1
    return mask_util.encode(mask)


def scene(rng, number, objects=4, jitter=4):
    """(image of the truth, detections): boxes whose detections lie beside them."""
    corners = rng.integers((0, 0), (25, 20), (objects, 2))
    boxes = np.concatenate([corners, corners + rng.integers(8, 16, (objects, 2))], 1)
    labels = rng.integers(0, 2, objects)
    annotations = [
        {
            "label": int(label),
            "bbox": [float(v) for v in (*box[:2], *(box[2:] - box[:2]))],
            "area": float((box[2:] - box[:2]).prod()),
            "iscrowd": 0,
            "segmentation": mask_of(box),
        }
        for box, label in zip(boxes, labels)
    ]
    moved = np.clip(boxes + rng.integers(0, jitter + 1, boxes.shape), 0, 40)
    found = ImageDetections(
        number,
        SIZE,
        moved.astype(np.float32),
        rng.random(objects).astype(np.float32),
        labels.astype(np.int64),
        [mask_of(box)["counts"] for box in moved],
    )
    return TruthImage(number, SIZE, annotations), found


def data(scenes):
    return GroundTruth([image for image, _ in scenes], ["a", "b"], [1, 2])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_draw_counts_images_as_if_they_were_there_that_often(kind):
    rng = np.random.default_rng(0)
    scenes = [scene(rng, number) for number in range(5)]
    draws = np.array([[0, 1, 2, 3, 4], [2, 2, 2, 0, 4], [3, 3, 3, 3, 3]])
    found = resampled_ap(data(scenes), [x for _, x in scenes], kind, draws)
    for draw, ap in zip(draws, found):
        copies = [
            (scenes[i][0]._replace(image_id=n), scenes[i][1]._replace(image_id=n))
            for n, i in enumerate(draw)
        ]
        truth = data(copies)
        tables = evaluate_coco(truth, [x for _, x in copies], kind, "pycocotools")
        assert ap == pytest.approx(coco_metrics(tables, truth.class_names)["AP"])
    assert len(set(found.tolist())) == 3


def test_an_interval_holds_ap_and_is_narrower_with_more_images():
    widths = []
    for count in (6, 60):
        rng = np.random.default_rng(1)
        scenes = [scene(rng, number) for number in range(count)]
        truth, detections = data(scenes), [x for _, x in scenes]
        low, high = bootstrap_interval(truth, detections, "bbox")
        tables = evaluate_coco(truth, detections, "bbox")
        assert low < coco_metrics(tables, truth.class_names)["AP"] < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_perfect_detections_have_no_spread_and_no_objects_no_interval():
    rng = np.random.default_rng(2)
    perfect = [scene(rng, number, jitter=0) for number in range(4)]
    interval = bootstrap_interval(data(perfect), [x for _, x in perfect], "segm")
    assert interval == pytest.approx((100, 100))
    empty = [(image._replace(annotations=[]), found) for image, found in perfect]
    assert np.isnan(bootstrap_interval(data(empty), [x for _, x in empty], "segm")).all()
