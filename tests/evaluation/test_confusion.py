"""Confusion of classes and the quality of images, on scenes with known answers."""

import numpy as np
import pytest

from d2ext.evaluation.confusion import confusion

from tests.evaluation.helpers import make_detections, make_truth

SIZE = (60, 80)
LEFT = {"label": 0, "box": [2, 10, 20, 20]}
RIGHT = {"label": 1, "box": [40, 10, 20, 20]}
FAR = {"label": 1, "box": [30, 45, 10, 10]}


def found(*shapes):
    return make_detections(0, [{"score": 0.9, **shape} for shape in shapes], SIZE)


def test_the_table_has_hits_confusions_alarms_and_misses():
    truth = make_truth([[LEFT, RIGHT], [LEFT]], SIZE, "ab")
    first = found(LEFT, {**RIGHT, "label": 0}, FAR)
    result = confusion(truth, [first, None], True)
    assert result.table.tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    # One hit, two false alarms, one miss; in the second image a miss.
    assert result.quality == pytest.approx([1 / (1 + 2 / 2 + 1 / 2), 0])


def test_quality_is_the_overlap_of_what_was_found():
    truth = make_truth([[LEFT], [], []], SIZE, "ab")
    moved = {**LEFT, "box": [7, 10, 20, 20]}
    result = confusion(truth, [found(moved), None, found(FAR)], False)
    assert result.quality[0] == pytest.approx(15 / 25)
    assert np.isnan(result.quality[1]) and result.quality[2] == 0


def test_low_scores_do_not_count():
    truth = make_truth([[LEFT]], SIZE, "ab")
    low = found({**LEFT, "score": 0.4})
    assert confusion(truth, [low], True).table.tolist()[0] == [0, 0, 1]
    assert confusion(truth, [low], True, score=0.3).table.tolist()[0] == [1, 0, 0]


def test_what_lies_in_a_crowd_region_is_no_false_alarm():
    truth = make_truth([[{**LEFT, "crowd": 1}]], SIZE, "ab")
    part = {**LEFT, "box": [4, 12, 8, 8]}
    assert confusion(truth, [found(part)], True).table.sum() == 0
    assert confusion(truth, [found({**part, "label": 1})], True).table.tolist()[-1] == [0, 1, 0]


def test_of_two_objects_in_one_place_that_of_the_own_class_is_taken():
    truth = make_truth([[{**LEFT, "label": 1}, LEFT]], SIZE, "ab")
    result = confusion(truth, [found({**LEFT, "label": 1}, LEFT)], True)
    assert result.table.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert result.quality == pytest.approx([1])
