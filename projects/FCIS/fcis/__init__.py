"""Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017,
arXiv:1611.07709).

Importing the package registers ``FCIS`` and ``FCISROIHeads`` for yaml configs.
"""

from d2ext.config import register_config

from .config import add_fcis_config
from .meta_arch import FCIS
from .roi_heads import FCISROIHeads
from .sampler import RegionSampler
from .test_time_augmentation import FCISWithTTA

register_config(add_fcis_config)

__all__ = ["FCIS", "FCISROIHeads", "FCISWithTTA", "RegionSampler", "add_fcis_config"]
