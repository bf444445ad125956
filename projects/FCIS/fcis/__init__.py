"""Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017,
arXiv:1611.07709).

Importing the package registers `FCIS` and `FCISROIHeads` for yaml configs.
"""

from d2ext.config import register_config
from d2ext.projects.fcis.config import add_fcis_config
from d2ext.projects.fcis.export import FCISForm
from d2ext.projects.fcis.meta_arch import FCIS
from d2ext.projects.fcis.roi_heads import FCISROIHeads
from d2ext.projects.fcis.sampler import RegionSampler
from d2ext.projects.fcis.test_time_augmentation import FCISWithTTA

register_config(add_fcis_config)

__all__ = ["FCIS", "FCISForm", "FCISROIHeads", "FCISWithTTA", "RegionSampler", "add_fcis_config"]
