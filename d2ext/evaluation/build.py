"""One evaluator per data set."""

import os
from collections.abc import Sequence

from d2ext.errors import UserError
from d2ext.evaluation.evaluator import InstanceEvaluator

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

# What is measured on a data set by itself, by its evaluator_type.
OWN_METRICS = {"coco": ("coco",), "coco_panoptic_seg": ("coco",), "voc_sds": ("voc_sds",)}


def evaluator_kind(dataset_name: str) -> str:
    """The evaluator_type of a registered data set.

    Raises:
        UserError: there is no evaluator for it.
    """
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    if kind not in OWN_METRICS:
        raise UserError(
            f"data set '{dataset_name}' has evaluator_type {kind!r}, for which there is no "
            f"evaluator; known: {', '.join(map(repr, OWN_METRICS))}"
        )
    return kind


def build_evaluator(
    dataset_name: str,
    output_dir: str | None = None,
    *,
    metrics: Sequence[str] = (),
    mapr_ious: Sequence[float] = (0.5, 0.7),
    mapr_area: bool = False,
    max_detections: int = 100,
) -> DatasetEvaluator:
    """The evaluator that `MetadataCatalog.get(dataset_name).evaluator_type` asks for.

    Args:
        dataset_name: a registered data set.
        output_dir: results go to `output_dir/inference/<dataset_name>`; `None`: nowhere.
        metrics: what to measure in addition: `"coco"`, `"boundary"`, `"voc_sds"`.
        mapr_ious: IoU thresholds of mAP^r.
        mapr_area: mAP^r by the area under the curve instead of eleven points.
        max_detections: see `InstanceEvaluator`.

    Raises:
        UserError: there is no evaluator for such a data set, or no such metric.
    """
    kind = evaluator_kind(dataset_name)
    folder = os.path.join(output_dir, "inference", dataset_name) if output_dir else None
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    return InstanceEvaluator(
        dataset_name,
        tuple(dict.fromkeys([*OWN_METRICS[kind], *metrics])),
        folder,
        mapr_ious=mapr_ious,
        mapr_area=mapr_area,
        max_detections=max_detections,
    )
