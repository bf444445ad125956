"""Multi-task Network Cascades (Dai, He, Sun, CVPR 2016, arXiv:1512.04412).

Importing the package registers `MultitaskNetworkCascade`, `DifferentiableRPN` and
`MNCROIHeads` for yaml configs.
"""

from d2ext.config import register_config
from mnc.box_transform import MNCBoxTransform
from mnc.config import add_mnc_config
from mnc.heads import MNCCategoryHead, MNCMaskHead, MNCRes5CategoryHead
from mnc.meta_arch import MultitaskNetworkCascade
from mnc.pooler import build_pooler
from mnc.roi_heads import MNCROIHeads
from mnc.rpn import DifferentiableRPN
from mnc.sampler import MNCSampler
from mnc.voting import InstanceVoting

register_config(add_mnc_config)

__all__ = [
    "DifferentiableRPN",
    "InstanceVoting",
    "MNCBoxTransform",
    "MNCCategoryHead",
    "MNCMaskHead",
    "MNCROIHeads",
    "MNCRes5CategoryHead",
    "MNCSampler",
    "MultitaskNetworkCascade",
    "add_mnc_config",
    "build_pooler",
]
