"""One picture of all networks: ground truth and predictions on a few image files."""

from collections.abc import Sequence

import numpy as np

from d2ext.engine import Predictor
from d2ext.visualization import draw_ground_truth, draw_predictions, side_by_side

from detectron2.data.detection_utils import read_image


def choose_records(records: Sequence[dict], count: int) -> list[dict]:
    """Records spread evenly over those with three objects or more (all, if there are too few)."""
    good = [r for r in records if len(r.get("annotations", ())) >= 3]
    good = good if len(good) >= count else list(records)
    positions = np.linspace(0, len(good) - 1, min(count, len(good))).round().astype(int)
    return [good[i] for i in positions]


def ground_truth_pictures(records: Sequence[dict], metadata) -> list[np.ndarray]:
    return [draw_ground_truth(record, metadata) for record in records]


def prediction_pictures(predictor: Predictor, records: Sequence[dict]) -> list[np.ndarray]:
    """Predictions on the image files of the records, through the public predictor."""
    pictures = []
    for record in records:
        image = read_image(record["file_name"], "BGR")
        instances = predictor(image)["instances"]
        pictures.append(draw_predictions(image[..., ::-1], instances, predictor.metadata))
    return pictures


def overview(columns: dict[str, Sequence[np.ndarray]]) -> np.ndarray:
    """A row per image, a column per network.

    Args:
        columns: pictures by the title above them.

    Returns:
        uint8 RGB array.
    """
    count = min(len(pictures) for pictures in columns.values())
    panels = [pictures[row] for row in range(count) for pictures in columns.values()]
    titles = [*columns, *([""] * (len(panels) - len(columns)))]
    return side_by_side(panels, titles, columns=len(columns))
