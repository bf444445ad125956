"""Lineages and building blocks of the models; importing this package registers them for yaml."""

from d2ext import compat

compat.patch_structures()

from d2ext.modeling.backbone import VGG16, CaffeResNet, ResNetFPN, SlimResNetFPN
from d2ext.modeling.baselines import (
    ReproducibleCascadeROIHeads,
    ReproducibleROIHeads,
    ReproducibleRPN,
)
from d2ext.modeling.cascade.heads import MultiStageROIHeads
from d2ext.modeling.detector import ReproducibleRCNN
from d2ext.modeling.normed_heads import NormedConvFCHead, NormedMaskHead
from d2ext.modeling.pasting import paste_region_masks
from d2ext.modeling.poolers import build_region_pooler, register_pooler_types
from d2ext.modeling.regions.refinement import ClampedBox2BoxTransform
from d2ext.modeling.regions.sampling import ProposalSampler
from d2ext.modeling.rpn.anchors import RoundedAnchorGenerator
from d2ext.modeling.rpn.caffe import CaffeRPN
from d2ext.modeling.rpn.mmdet import InsideAnchorRPN

register_pooler_types()
compat.paste_region_masks_with(paste_region_masks)

__all__ = [
    "CaffeRPN",
    "CaffeResNet",
    "ClampedBox2BoxTransform",
    "InsideAnchorRPN",
    "MultiStageROIHeads",
    "NormedConvFCHead",
    "NormedMaskHead",
    "ProposalSampler",
    "ResNetFPN",
    "ReproducibleCascadeROIHeads",
    "ReproducibleRCNN",
    "ReproducibleROIHeads",
    "ReproducibleRPN",
    "RoundedAnchorGenerator",
    "SlimResNetFPN",
    "VGG16",
    "build_region_pooler",
]
