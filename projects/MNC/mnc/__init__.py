"""Multi-task Network Cascades (Dai, He, Sun, CVPR 2016, arXiv:1512.04412).

Importing the package registers ``MultitaskNetworkCascade``, ``DifferentiableRPN`` and
``MNCROIHeads`` for yaml configs.
"""

from d2ext.config import register_config

from .box_transform import MNCBoxTransform
from .config import add_mnc_config
from .heads import MNCCategoryHead, MNCMaskHead, MNCRes5CategoryHead
from .meta_arch import MultitaskNetworkCascade
from .pooler import build_pooler
from .roi_heads import MNCROIHeads
from .rpn import DifferentiableRPN
from .sampler import MNCSampler
from .voting import InstanceVoting

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
