"""How much an AP would vary with other test images: the bootstrap over images (Efron, 1979).

The images of the test set are drawn anew, with replacement; AP is computed for each draw from the
matches of each image, which do not depend on the other images.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from d2ext.evaluation.coco_scores import MAX_DETECTIONS
from d2ext.evaluation.ground_truth import GroundTruth
from d2ext.evaluation.matches import coco_matches, weighted_ap
from d2ext.evaluation.predictions import ImageDetections

# Test sets of so many images at most have an interval printed beside AP.
MOST_IMAGES = 100
DRAWS = 200


def image_weights(draws: np.ndarray) -> np.ndarray:
    """How often each image is in each draw.

    Args:
        draws: (D, N) positions 0..N - 1.

    Returns:
        int (D, N).
    """
    draws = np.asarray(draws)
    return np.stack([np.bincount(draw, minlength=draws.shape[1]) for draw in draws])


def random_weights(count: int, draws: int = DRAWS) -> np.ndarray:
    """Weights of draws of `count` images with a fixed seed: the same for every model, so that
    differences between models can be drawn, too. int (draws, count)."""
    return image_weights(np.random.default_rng(0).integers(count, size=(draws, count)))


def resampled_ap(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    kind: str,
    draws: np.ndarray,
    max_detections: int = MAX_DETECTIONS[-1],
) -> np.ndarray:
    """AP of draws of the images.

    Args:
        truth, detections, kind, max_detections: as for `evaluate_coco`.
        draws: (D, N) positions in the order of the image ids, each 0..N - 1.

    Returns:
        (D,) percent; nan where a draw has no object.
    """
    weights = image_weights(draws)
    matches = coco_matches(truth, detections, kind, max_detections)
    values = [weighted_ap(sizes[0], weights).mean(axis=1) for sizes in matches]
    return mean_of_known(np.stack(values, axis=-1))


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without nan; nan if nothing is left."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=-1)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of draws (D,) without nan; nan if nothing is left."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_interval(
    truth: GroundTruth,
    detections: Sequence[ImageDetections | None],
    kind: str,
    max_detections: int = MAX_DETECTIONS[-1],
) -> tuple[float, float]:
    """The percentile interval of AP, 95%, from `DRAWS` draws with a fixed seed.

    Args:
        truth, detections, kind, max_detections: as for `evaluate_coco`.

    Returns:
        percent; nan if there is nothing to be found.
    """
    count = len(truth.images)
    draws = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    return percentile_interval(resampled_ap(truth, detections, kind, draws, max_detections))
