"""What a model finds, measured: COCO's AP and AR, boundary AP, and mAP^r of PASCAL VOC SDS."""

from d2ext import compat

compat.patch_evaluation()

from d2ext.evaluation.average_precision import average_precision
from d2ext.evaluation.boundary import boundary_iou, mask_boundary
from d2ext.evaluation.build import build_evaluator, evaluator_kind
from d2ext.evaluation.coco_scores import coco_metrics, evaluate_coco
from d2ext.evaluation.evaluator import InstanceEvaluator, VOCSDSEvaluator
from d2ext.evaluation.ground_truth import GroundTruth, load_ground_truth
from d2ext.evaluation.inference import run_inference
from d2ext.evaluation.mapr import evaluate_mapr, mapr_metrics

__all__ = [
    "GroundTruth",
    "InstanceEvaluator",
    "VOCSDSEvaluator",
    "average_precision",
    "boundary_iou",
    "build_evaluator",
    "evaluator_kind",
    "coco_metrics",
    "evaluate_coco",
    "evaluate_mapr",
    "load_ground_truth",
    "mapr_metrics",
    "mask_boundary",
    "run_inference",
]
