"""What writers get: the detections in one image that reach the threshold, small enough to keep."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util

from d2ext.errors import UserError
from d2ext.evaluation.predictions import ImageDetections, collect
from d2ext.inference.batching import Prediction
from d2ext.inference.records import ImageRecord

from detectron2.structures import Instances


@dataclasses.dataclass
class ImageResult:
    """The result for one image.

    Attributes:
        stem: what files of it are called, different for every image.
        instances: on the CPU, without those below the threshold.
        detections: the same, compact; labels are contiguous.
        image: uint8 (H, W, 3), BGR, if a writer needs it.
    """

    record: ImageRecord
    stem: str
    instances: Instances
    detections: ImageDetections
    image: np.ndarray | None = None

    def masks(self) -> list[np.ndarray]:
        """bool (H, W) of each detection; of its box for a model without masks."""
        if self.detections.masks is not None:
            return [mask_util.decode(rle).astype(bool) for rle in self.detections.rles()]
        height, width = self.detections.size
        found = []
        for x0, y0, x1, y1 in np.rint(self.detections.boxes).astype(int).clip(0).tolist():
            mask = np.zeros((height, width), bool)
            mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
            found.append(mask)
        return found


def above_threshold(prediction: Prediction, threshold: float) -> Instances:
    """Instances of a prediction that reach a score, on the CPU.

    Raises:
        UserError: the model gives no instances.
    """
    output = prediction.output or {}
    if "instances" not in output:
        raise UserError(
            f"the model gives {', '.join(output) or 'nothing'}, but no instances to write"
        )
    instances = output["instances"]
    return instances[instances.scores >= threshold].to("cpu")


def image_result(prediction: Prediction, stem: str, threshold: float) -> ImageResult:
    """The result of a prediction without error."""
    instances = above_threshold(prediction, threshold)
    detections = collect(instances, prediction.record.image_id)
    return ImageResult(prediction.record, stem, instances, detections, prediction.image)


def file_part(name: str) -> str:
    """A class name as part of the name of a file."""
    return re.sub(r"[^\w\-. ]", "_", name) or "_"


def category_ids(names: Sequence[str], categories: Sequence[dict]) -> list[int]:
    """Ids of the classes of a model in results: those of a COCO file that has the same names, else
    1, 2, ..."""
    known = {c["name"]: c["id"] for c in categories}
    if len(known) == len(categories) and set(known) == set(names):
        return [known[name] for name in names]
    return list(range(1, len(names) + 1))
