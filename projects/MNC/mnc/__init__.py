"""Multi-task Network Cascades (Dai, He, Sun, CVPR 2016, arXiv:1512.04412).

Importing the package registers `MultitaskNetworkCascade`, `DifferentiableRPN` and
`MNCROIHeads` for yaml configs.
"""

from d2ext.config import register_config
from d2ext.projects.mnc.box_transform import MNCBoxTransform
from d2ext.projects.mnc.config import add_mnc_config
from d2ext.projects.mnc.export import MNCForm
from d2ext.projects.mnc.heads import MNCCategoryHead, MNCMaskHead, MNCRes5CategoryHead
from d2ext.projects.mnc.meta_arch import MultitaskNetworkCascade
from d2ext.projects.mnc.pooler import build_pooler
from d2ext.projects.mnc.roi_heads import MNCROIHeads
from d2ext.projects.mnc.rpn import DifferentiableRPN
from d2ext.projects.mnc.sampler import MNCSampler
from d2ext.projects.mnc.voting import InstanceVoting

register_config(add_mnc_config)

__all__ = [
    "DifferentiableRPN",
    "InstanceVoting",
    "MNCBoxTransform",
    "MNCCategoryHead",
    "MNCForm",
    "MNCMaskHead",
    "MNCROIHeads",
    "MNCRes5CategoryHead",
    "MNCSampler",
    "MultitaskNetworkCascade",
    "add_mnc_config",
    "build_pooler",
]
