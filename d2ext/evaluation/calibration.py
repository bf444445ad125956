"""Do scores mean what they say? The part of detections of a score that are hits, beside the score.

The expected calibration error (Guo et al., ICML 2017) of detections (Kueppers et al., CVPR
workshops 2020): a detection is right if it is a hit at an IoU of 0.5.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from d2ext.evaluation.matches import ClassMatches

BINS = 10


class Calibration(NamedTuple):
    """Reliability by score; B = 10 bins of equal width."""

    score: np.ndarray  # (B,) mean score; nan in an empty bin
    precision: np.ndarray  # (B,) part of hits; nan in an empty bin
    counts: np.ndarray  # int (B,)
    error: float  # mean of |score - precision| over all detections; nan without any


def calibration(by_class: Sequence[ClassMatches]) -> Calibration:
    """How well scores are calibrated.

    Args:
        by_class: matches of each class, of objects of all sizes. Detections in crowd regions do
            not count.
    """
    kept = [~matches.ignored[0] for matches in by_class]
    scores = np.concatenate([m.scores[k] for m, k in zip(by_class, kept)] or [np.zeros(0)])
    hits = np.concatenate([m.hits[0][k] for m, k in zip(by_class, kept)] or [np.zeros(0)])
    # A bin has its upper edge, as in the paper; a score of 0 is in the first one.
    place = np.clip(np.ceil(scores * BINS).astype(np.int64) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        score = np.bincount(place, scores, BINS) / count
        precision = np.bincount(place, hits, BINS) / count
    gaps = np.nan_to_num(np.abs(score - precision)) * count
    error = float(gaps.sum() / len(scores)) if len(scores) else float("nan")
    return Calibration(score, precision, count, error)
