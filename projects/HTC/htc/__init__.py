"""Hybrid Task Cascade for Instance Segmentation (Chen et al., CVPR 2019, arXiv:1901.07518).

Importing the package registers `HybridTaskCascade`, `HTCROIHeads` and `HTCMaskHead` for yaml
configs.
"""

from d2ext.config import register_config
from d2ext.projects.htc.config import add_htc_config
from d2ext.projects.htc.mask_head import HTCMaskHead
from d2ext.projects.htc.meta_arch import HybridTaskCascade
from d2ext.projects.htc.roi_heads import HTCROIHeads
from d2ext.projects.htc.semantic_head import FusedSemanticHead

register_config(add_htc_config)

__all__ = [
    "FusedSemanticHead",
    "HTCMaskHead",
    "HTCROIHeads",
    "HybridTaskCascade",
    "add_htc_config",
]
