"""AP and curves from matches as arrays, against COCO's own tables."""

import numpy as np
import pytest

from d2ext.evaluation import coco_metrics, evaluate_coco
from d2ext.evaluation.coco_scores import percent
from d2ext.evaluation.matches import SIZES, coco_matches, precision_at_recalls, weighted_ap

from tests.evaluation.helpers import make_detections, make_truth

SIZE = (200, 220)
NAMES = ["a", "b", "never"]


@pytest.fixture(scope="module")
def data():
    """Objects of all three sizes, crowds, an empty image and one without detections."""
    rng = np.random.default_rng(3)
    images, found = [], []
    for number in range(9):
        shapes = []
        for _ in range(0 if number == 4 else 6):
            width, height = rng.choice([12, 40, 110], 2) + rng.integers(0, 9, 2)
            corner = rng.integers(0, 80, 2)
            shapes.append(
                {
                    "label": int(rng.integers(0, 2)),
                    "box": [int(v) for v in (*corner, width, height)],
                    "crowd": int(rng.random() < 0.15),
                }
            )
        images.append(shapes)
        moved = [
            {
                "label": x["label"],
                "box": [x["box"][0] + int(rng.integers(0, 6)), *x["box"][1:]],
                "score": float(rng.random()),
            }
            for x in shapes * 2
        ]
        found.append(None if number == 6 else make_detections(number, moved, SIZE))
    return make_truth(images, SIZE, NAMES), found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_of_each_size_is_coco_s(data, kind):
    truth, found = data
    tables = evaluate_coco(truth, found, kind)
    metrics = coco_metrics(tables, NAMES)
    matches = coco_matches(truth, found, kind)
    once = np.ones((1, len(truth.images)), int)
    for index, size in enumerate(SIZES):
        values = [weighted_ap(sizes[index], once)[0] for sizes in matches]
        assert np.nanmean(values) == pytest.approx(metrics[f"AP{size}"])
        assert np.isnan(values[NAMES.index("never")]).all()
    for label, sizes in enumerate(matches[:2]):
        own = weighted_ap(sizes[0], once)[0]
        assert own.mean() == pytest.approx(metrics[f"AP-{NAMES[label]}"])
        assert own[0] == pytest.approx(percent(tables.precision[0, :, label, 0, -1]))


def test_curves_are_coco_s(data):
    truth, found = data
    precision = evaluate_coco(truth, found, "segm").precision
    for label, sizes in enumerate(coco_matches(truth, found, "segm")):
        for row, threshold in ((0, 0.5), (5, 0.75)):
            curve = precision_at_recalls(sizes[0], threshold)
            if NAMES[label] == "never":
                assert np.isnan(curve).all()
            else:
                np.testing.assert_allclose(curve, precision[row, :, label, 0, -1])


def test_no_detections_give_zero_and_no_objects_nan():
    truth = make_truth([[{"label": 0, "box": [1, 2, 30, 40]}], []], SIZE, NAMES)
    ((all_sizes, *_), *_) = coco_matches(truth, [None, None], "bbox")
    assert (weighted_ap(all_sizes, np.array([[1, 1]])) == 0).all()
    assert np.isnan(weighted_ap(all_sizes, np.array([[0, 2]]))).all()
    assert (precision_at_recalls(all_sizes, 0.5) == 0).all()
