"""Backbones and their layers; importing this package registers the builders for yaml configs."""

from d2ext.modeling.backbone.deform import (
    DeformBottleneckBlock,
    TorchvisionDeformConv,
    TorchvisionModulatedDeformConv,
)
from d2ext.modeling.backbone.norm import EvalStatsBatchNorm2d, narrow_group_norm, resolve_norm
from d2ext.modeling.backbone.pyramid import SimpleFeaturePyramid
from d2ext.modeling.backbone.resnet_caffe import CaffeResNet, CaffeStem, build_caffe_resnet_backbone
from d2ext.modeling.backbone.resnet_fpn import (
    ResNetFPN,
    SlimResNetFPN,
    build_deform_resnet_fpn_backbone,
    build_slim_resnet_fpn_backbone,
)
from d2ext.modeling.backbone.timm import (
    TimmBackbone,
    TimmFPN,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from d2ext.modeling.backbone.vgg import VGG16, build_vgg16_backbone

__all__ = [
    "CaffeResNet",
    "CaffeStem",
    "DeformBottleneckBlock",
    "EvalStatsBatchNorm2d",
    "ResNetFPN",
    "SimpleFeaturePyramid",
    "SlimResNetFPN",
    "TimmBackbone",
    "TimmFPN",
    "TorchvisionDeformConv",
    "TorchvisionModulatedDeformConv",
    "VGG16",
    "build_caffe_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
    "build_slim_resnet_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_vgg16_backbone",
    "narrow_group_norm",
    "resolve_norm",
]
