"""mAP^r against a brute-force evaluation with plain loops over pixels, and hand-made cases."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.evaluation import average_precision, evaluate_mapr, mapr_metrics
from d2ext.evaluation.average_precision import ClassDetections, judge, recall_and_precision
from d2ext.evaluation.ground_truth import GroundTruth, TruthImage
from d2ext.evaluation.predictions import ImageDetections

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
IOUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def vector(name):
    """(inputs, expected) of a vector in either file."""
    for path in VECTORS.glob("*_vectors.json"):
        for entry in json.loads(path.read_text())["vectors"]:
            if entry["id"] == name:
                return entry["inputs"], entry["expected"]
    raise KeyError(name)


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def truth_of(images, num_classes):
    """GroundTruth of `[(size, [(class, mask, crowd), ...]), ...]`."""
    entries = []
    for number, (size, objects) in enumerate(images):
        annotations = [
            {
                "bbox": [0, 0, 1, 1],
                "segmentation": encode(mask),
                "area": int(mask.sum()),
                "iscrowd": int(crowd),
                "label": label,
            }
            for label, mask, crowd in objects
        ]
        entries.append(TruthImage(number, size, annotations))
    names = [f"class{i}" for i in range(num_classes)]
    return GroundTruth(entries, names, list(range(1, num_classes + 1)))


def found_of(images):
    """ImageDetections of `[(size, [(class, mask, score), ...]), ...]`; None: no output."""
    result = []
    for number, (size, objects) in enumerate(images):
        if objects is None:
            result.append(None)
            continue
        result.append(
            ImageDetections(
                number,
                size,
                np.zeros((len(objects), 4), np.float32),
                np.array([score for _, _, score in objects], np.float32),
                np.array([label for label, _, _ in objects], np.int64),
                [encode(mask)["counts"] for _, mask, _ in objects],
            )
        )
    return result


# -------------------------------------------------------------------------------------------------
# The oracle: one class, one threshold, one detection at a time


def overlap(first, second):
    both = either = 0
    for a, b in zip(first.flatten().tolist(), second.flatten().tolist()):
        both += bool(a and b)
        either += bool(a or b)
    return both / either if both else 0.0


def oracle(truth, found, label, threshold):
    """AP^r in percent, from the definition; None for a class without objects."""
    queue, total = [], 0
    for image, (_, objects) in enumerate(found):
        queue += [(s, image, mask) for c, mask, s in objects or () if c == label]
        total += sum(c == label for c, _, _ in truth[image][1])
    if total == 0:
        return None
    queue.sort(key=lambda entry: -entry[0])  # stable: equal scores stay in the order of the images
    claimed, hits = set(), []
    for _, image, mask in queue:
        best, chosen = -1.0, None
        for index, (c, other, _) in enumerate(truth[image][1]):
            if c == label and overlap(mask, other) > best:
                best, chosen = overlap(mask, other), (image, index)
        hit = chosen is not None and best >= threshold and chosen not in claimed
        hits.append(hit)
        if hit:
            claimed.add(chosen)
    points = []
    for point in np.arange(0, 1.1, 0.1):
        best = 0.0
        for n in range(1, len(hits) + 1):
            if sum(hits[:n]) / total >= point:
                best = max(best, sum(hits[:n]) / n)
        points.append(best)
    return 100 * sum(points) / 11


def rectangle(rng, size):
    height, width = size
    mask = np.zeros(size, bool)
    y, x = rng.integers(0, height - 1), rng.integers(0, width - 1)
    mask[y : y + rng.integers(1, 5), x : x + rng.integers(1, 6)] = True
    return mask


def random_set(seed):
    """Small masks, so that overlaps are often simple fractions, and few different scores."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 4))
    truth, found = [], []
    for _ in range(int(rng.integers(1, 5))):
        size = (int(rng.integers(4, 8)), int(rng.integers(4, 9)))
        objects = [
            (int(rng.integers(num_classes)), rectangle(rng, size), False)
            for _ in range(int(rng.integers(0, 4)))
        ]
        detections = []
        for _ in range(int(rng.integers(0, 7))):
            kind = rng.integers(5)
            label, mask = int(rng.integers(num_classes)), rectangle(rng, size)
            if kind == 0:
                mask = np.zeros(size, bool)  # an empty mask
            elif kind < 4 and objects:  # an object with some pixels lost, or unchanged
                label, mask, _ = objects[rng.integers(len(objects))]
                mask = mask & (rng.random(size) < rng.choice([0.5, 0.7, 1.0]))
            score = float(np.float32(rng.integers(1, 6) / 5))
            detections += [(label, mask, score)] * int(rng.integers(1, 3))  # often twice
        truth.append((size, objects))
        found.append((size, None if rng.random() < 0.1 else detections))
    return truth, found, num_classes


@pytest.mark.parametrize("block", range(10))
def test_random_data_sets_agree_with_brute_force(block):
    seen = {"hit": 0, "miss": 0, "absent": 0}
    for seed in range(20 * block, 20 * block + 20):
        truth, found, num_classes = random_set(seed)
        result = evaluate_mapr(truth_of(truth, num_classes), found_of(found))
        assert result.ious == list(IOUS)
        for label in range(num_classes):
            for column, iou in enumerate(IOUS):
                expected = oracle(truth, found, label, iou)
                value = 100 * result.table[label, column]
                if expected is None:
                    assert np.isnan(value)
                else:
                    assert value == pytest.approx(expected, abs=1e-9), (seed, label, iou)
                seen["absent" if expected is None else "hit" if expected else "miss"] += 1
    assert all(seen.values())


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_masks_are_ranked_by_scores_of_their_own(seed):
    truth, found, num_classes = random_set(seed)
    given, rng = found_of(found), np.random.default_rng(seed)
    rescored = []
    for number, (size, objects) in enumerate(found):
        scores = rng.random(len(objects or ())).astype(np.float32)
        if objects is not None:
            given[number] = given[number]._replace(mask_scores=scores)
            objects = [(c, mask, s) for (c, mask, _), s in zip(objects, scores.tolist())]
        rescored.append((size, objects))
    table = evaluate_mapr(truth_of(truth, num_classes), given).table
    expected = [[oracle(truth, rescored, c, iou) for iou in IOUS] for c in range(num_classes)]
    np.testing.assert_allclose(100 * table, np.array(expected, float), atol=1e-9)
    by_box = evaluate_mapr(truth_of(truth, num_classes), found_of(found)).table
    assert not np.array_equal(table, by_box, equal_nan=True)


def test_eleven_points_and_area_of_a_curve_that_ends_exactly_at_a_point():
    inputs, expected = vector("EV1")
    recall, precision = recall_and_precision(np.array(inputs["tp"]), inputs["npos"])
    np.testing.assert_allclose(recall, expected["recall"], atol=1e-8)
    np.testing.assert_allclose(precision, expected["precision"], atol=1e-8)
    hits, npos = np.array(inputs["tp"]), inputs["npos"]
    assert average_precision(hits, npos) == pytest.approx(expected["ap_11pt"], abs=1e-8)
    assert average_precision(hits, npos, area=True) == pytest.approx(expected["ap_area"], abs=1e-8)


def test_eleven_points_of_a_second_curve():
    inputs, expected = vector("eval_19_ap11")
    recall, precision = recall_and_precision(np.array(inputs["tp_sorted"]), inputs["num_gt"])
    np.testing.assert_allclose(recall, expected["recall"], atol=1e-7)
    np.testing.assert_allclose(precision, expected["precision"], atol=1e-7)
    found = average_precision(np.array(inputs["tp_sorted"]), inputs["num_gt"])
    assert found == pytest.approx(expected["ap"], abs=1e-9)


def pasted(entry, size=(12, 14)):
    """The mask of an inclusive box; a constant 2x2 mask fills it."""
    x1, y1, x2, y2 = entry["box"]
    values = np.array(entry["mask"])
    mask = np.zeros(size, bool)
    fits = values.shape == (y2 - y1 + 1, x2 - x1 + 1)
    mask[y1 : y2 + 1, x1 : x2 + 1] = values if fits else values.min() > 0.4
    return mask


def test_three_images_of_one_class():
    inputs, expected = vector("EV2")
    names, size = ["A", "B", "C"], (12, 14)
    truth = [(size, [(0, pasted(g), False) for g in inputs["gts"].get(name, [])]) for name in names]
    found = [
        (size, [(0, pasted(d), d["score"]) for d in inputs["dets"] if d["image"] == name])
        for name in names
    ]
    result = evaluate_mapr(truth_of(truth, 1), found_of(found), ious=(0.5, 0.7))
    assert result.mean(0.5) == pytest.approx(expected["ap_05"], abs=1e-8)
    assert result.mean(0.7) == pytest.approx(expected["ap_07"], abs=1e-8)


def test_judgements_are_those_of_the_vector():
    inputs, expected = vector("EV2")
    detections = ClassDetections(
        scores=np.array([d["score"] for d in inputs["dets"]]),
        overlaps=np.array([-1.0 if x is None else x for x in expected["best_iou"]]),
        objects=np.array([0, 0, 2, 0, 1]),
    )
    assert judge(detections, 0.5).tolist() == expected["tp_at_05"]
    assert judge(detections, 0.7).tolist() == expected["tp_at_07"]


def test_an_overlap_of_exactly_the_threshold_is_a_hit():
    size = (1, 10)
    whole, part = np.ones(size, bool), np.zeros(size, bool)
    for count, iou in ((5, 0.5), (7, 0.7), (3, 0.3), (9, 0.9)):
        part[:] = False
        part[0, :count] = True
        result = evaluate_mapr(
            truth_of([(size, [(0, whole, False)])], 1), found_of([(size, [(0, part, 0.5)])])
        )
        assert result.mean(iou) == 1.0
        assert result.table[0, result.ious.index(iou) + 1 :].tolist() == [0.0] * (
            len(result.ious) - result.ious.index(iou) - 1
        )


def test_there_is_no_second_choice():
    """Both detections prefer the first object, though the second one would do at 0.3."""
    size = (1, 10)
    first, second = np.zeros(size, bool), np.zeros(size, bool)
    first[0, :6], second[0, 3:9] = True, True
    both = np.zeros(size, bool)
    both[0, 2:7] = True
    truth = truth_of([(size, [(0, first, False), (0, second, False)])], 1)
    found = [(size, [(0, first, 0.9), (0, both, 0.8)])]
    # 4 of 7 pixels of either object: the first of the two is taken, and it is used up
    assert overlap(both, first) == overlap(both, second) == 4 / 7
    result = evaluate_mapr(truth, found_of(found))
    assert result.mean(0.5) == pytest.approx(6 / 11)  # recall 1/2 only


def test_equal_scores_keep_the_order_of_the_images():
    size = (1, 4)
    mask, other = np.array([[1, 1, 0, 0]], bool), np.array([[0, 0, 1, 1]], bool)
    truth = [(size, [(0, mask, False)]), (size, [(0, mask, False)])]
    hit, miss = (size, [(0, mask, 0.5)]), (size, [(0, other, 0.5)])
    first = evaluate_mapr(truth_of(truth, 1), found_of([hit, miss])).mean(0.5)
    last = evaluate_mapr(truth_of(truth, 1), found_of([miss, hit])).mean(0.5)
    assert first == pytest.approx(6 / 11) and last == pytest.approx(6 * 0.5 / 11)


def test_crowd_regions_are_no_objects_and_hide_false_alarms():
    size = (2, 10)
    thing, crowd = np.zeros(size, bool), np.zeros(size, bool)
    thing[0], crowd[1] = True, True
    half_out = np.zeros(size, bool)
    half_out[1, :4], half_out[0, 4:] = True, True  # 4 of 10 pixels in the crowd
    truth = [(size, [(0, crowd, True), (0, thing, False)])]

    def points(*extra):
        detections = [*((0, mask, 0.9) for mask in extra), (0, thing, 0.5)]
        return evaluate_mapr(truth_of(truth, 1), found_of([(size, detections)])).mean(0.5)

    assert points() == points(crowd) == 1.0
    assert points(half_out) == 0.5  # overlap 6/14 with the thing, and too little in the crowd
    assert points(half_out, half_out) == pytest.approx(1 / 3)


def test_a_hit_inside_of_a_crowd_region_stays_a_hit():
    size = (2, 10)
    thing, crowd = np.zeros(size, bool), np.ones(size, bool)
    thing[0] = True
    truth = truth_of([(size, [(0, crowd, True), (0, thing, False)])], 1)
    assert evaluate_mapr(truth, found_of([(size, [(0, thing, 0.5)])])).mean(0.5) == 1.0


def test_crowd_regions_hide_false_alarms_of_their_own_class_only():
    size = (2, 10)
    thing, crowd = np.zeros(size, bool), np.zeros(size, bool)
    thing[0], crowd[1] = True, True
    truth = truth_of([(size, [(0, thing, False), (1, crowd, True)])], 2)
    found = found_of([(size, [(0, crowd, 0.9), (0, thing, 0.5)])])
    assert evaluate_mapr(truth, found).table[0, 0] == 0.5


def test_results_by_name_are_percentages_and_the_volume_is_the_mean_over_nine_thresholds():
    truth, found, num_classes = random_set(7)
    result = evaluate_mapr(truth_of(truth, num_classes), found_of(found), ious=(0.5, 0.65))
    metrics = mapr_metrics(result, (0.5, 0.65))
    expected = []
    for iou in IOUS:
        values = [oracle(truth, found, label, iou) for label in range(num_classes)]
        expected.append(np.mean([v for v in values if v is not None]))
    assert metrics["mAPr_vol"] == pytest.approx(np.mean(expected))
    assert metrics["mAPr@0.5"] == pytest.approx(expected[4])
    assert set(metrics) == {"mAPr@0.5", "mAPr@0.65", "mAPr_vol"} | {
        f"APr@{iou}-class{i}" for iou in (0.5, 0.65) for i in range(num_classes)
    }


def test_the_area_under_the_curve_has_other_names():
    truth, found, num_classes = random_set(7)
    result = evaluate_mapr(truth_of(truth, num_classes), found_of(found), area=True)
    metrics = mapr_metrics(result, (0.5,), area=True)
    assert {"mAPr_area@0.5", "mAPr_area_vol", "APr_area@0.5-class0"} <= set(metrics)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan():
    size = (3, 3)
    mask = np.ones(size, bool)
    truth = truth_of([(size, [(0, mask, False)]), (size, [])], 2)
    result = evaluate_mapr(truth, [None, None])
    assert result.table[0].tolist() == [0.0] * 9 and np.isnan(result.table[1]).all()
    assert result.mean(0.5) == 0.0 == result.volume()
    empty = evaluate_mapr(truth_of([(size, [])], 2), [None])
    assert np.isnan(empty.mean(0.5)) and np.isnan(empty.volume())


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_a_threshold_outside_of_its_range_is_refused(threshold):
    detections = ClassDetections(np.ones(1), np.ones(1), np.zeros(1, int))
    with pytest.raises(ValueError, match="IoU threshold"):
        judge(detections, threshold)
