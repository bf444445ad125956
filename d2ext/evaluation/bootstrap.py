"""How much an AP would vary with other test images: the bootstrap over images (Efron, 1979).

The images of the test set are drawn anew, with replacement; AP is computed for each draw from the
matches of each image, which do not depend on the other images.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from d2ext.evaluation.coco_scores import MAX_DETECTIONS, match_coco, percent
from d2ext.evaluation.ground_truth import GroundTruth
from d2ext.evaluation.predictions import ImageDetections

# Test sets of so many images at most have an interval printed beside AP.
MOST_IMAGES = 100
DRAWS = 200


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
    evaluation = match_coco(truth, detections, kind, "pycocotools", max_detections)
    params = evaluation.params
    shape = len(params.catIds), len(params.areaRng), len(params.imgIds)
    matches = np.empty(shape, dtype=object)
    for place, match in enumerate(evaluation.evalImgs):
        matches.flat[place] = match
    # Of all sizes, and the largest number of detections: what AP is about.
    for each in (params, evaluation._paramsEval):
        each.areaRng, each.areaRngLbl = each.areaRng[:1], each.areaRngLbl[:1]
        each.maxDets = each.maxDets[-1:]
    found = []
    for draw in np.asarray(draws):
        evaluation.evalImgs = matches[:, :1, draw].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        found.append(percent(np.asarray(evaluation.eval["precision"])))
    return np.array(found)


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
    values = resampled_ap(truth, detections, kind, draws, max_detections)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
