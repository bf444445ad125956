"""Calibration: numbers that can be computed by hand, and a model that is calibrated by design."""

import numpy as np
import pytest

from d2ext.evaluation.calibration import calibration
from d2ext.evaluation.matches import THRESHOLDS, ClassMatches


def matches(scores, hits, ignored=None):
    count, rows = len(scores), len(THRESHOLDS)
    ignored = np.zeros(count, bool) if ignored is None else np.array(ignored, bool)
    # Only the lowest threshold is about calibration.
    verdicts = np.zeros((rows, count), bool)
    verdicts[0] = hits
    return ClassMatches(
        np.array(scores, float),
        np.zeros(count, int),
        verdicts,
        np.tile(ignored, (rows, 1)),
        np.array([1]),
    )


def test_error_is_the_mean_gap_weighted_by_the_detections():
    found = calibration([matches([0.95, 0.92, 0.15], [1, 0, 0]), matches([0.2], [1])])
    assert found.counts.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]  # 0.2 is in the bin below
    assert found.precision[[1, 9]].tolist() == [0.5, 0.5]
    assert found.score[9] == pytest.approx(0.935) and np.isnan(found.score[0])
    assert found.error == pytest.approx((2 * (0.935 - 0.5) + 2 * (0.5 - 0.175)) / 4)


def test_detections_in_crowd_regions_do_not_count():
    assert calibration([matches([0.9, 0.3], [1, 0], [0, 1])]).counts.sum() == 1


def test_a_model_whose_scores_are_probabilities_has_no_error():
    rng = np.random.default_rng(0)
    scores = rng.random(40000)
    hits = rng.random(40000) < scores
    assert calibration([matches(scores, hits)]).error < 0.01
    assert calibration([matches(scores**2, hits)]).error > 0.1


def test_nothing_found_has_no_error():
    assert np.isnan(calibration([]).error) and np.isnan(calibration([matches([], [])]).error)
