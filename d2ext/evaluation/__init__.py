"""What a model finds, measured: COCO's AP and AR, boundary AP, and mAP^r of PASCAL VOC SDS."""

from d2ext import compat

compat.patch_evaluation()

from .average_precision import average_precision  # noqa: E402
from .boundary import boundary_iou, mask_boundary  # noqa: E402
from .build import build_evaluator  # noqa: E402
from .coco_scores import coco_metrics, evaluate_coco  # noqa: E402
from .evaluator import InstanceEvaluator, VOCSDSEvaluator  # noqa: E402
from .ground_truth import GroundTruth, load_ground_truth  # noqa: E402
from .inference import run_inference  # noqa: E402
from .mapr import evaluate_mapr, mapr_metrics  # noqa: E402

__all__ = [
    "GroundTruth",
    "InstanceEvaluator",
    "VOCSDSEvaluator",
    "average_precision",
    "boundary_iou",
    "build_evaluator",
    "coco_metrics",
    "evaluate_coco",
    "evaluate_mapr",
    "load_ground_truth",
    "mapr_metrics",
    "mask_boundary",
    "run_inference",
]
