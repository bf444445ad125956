"""Mask Scoring R-CNN (Huang et al., CVPR 2019, arXiv:1903.00241).

Importing the package registers `MaskScoringROIHeads` for yaml configs.
"""

from d2ext.config import register_config
from mask_scoring.config import add_mask_scoring_config
from mask_scoring.mask_iou_head import MaskIoUHead
from mask_scoring.roi_heads import MaskScoringROIHeads
from mask_scoring.targets import mask_iou_targets, share_inside

register_config(add_mask_scoring_config)

__all__ = [
    "MaskIoUHead",
    "MaskScoringROIHeads",
    "add_mask_scoring_config",
    "mask_iou_targets",
    "share_inside",
]
