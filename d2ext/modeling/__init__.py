"""Lineages and building blocks of the models; importing this package registers them for yaml."""

from d2ext import compat

compat.patch_structures()

from .backbone import VGG16, CaffeResNet, ResNetFPN, SlimResNetFPN  # noqa: E402
from .cascade.heads import MultiStageROIHeads  # noqa: E402
from .detector import ReproducibleRCNN  # noqa: E402
from .regions.refinement import ClampedBox2BoxTransform  # noqa: E402
from .regions.sampling import ProposalSampler  # noqa: E402
from .rpn.anchors import RoundedAnchorGenerator  # noqa: E402
from .rpn.caffe import CaffeRPN  # noqa: E402
from .rpn.mmdet import InsideAnchorRPN  # noqa: E402

__all__ = [
    "CaffeRPN",
    "CaffeResNet",
    "ClampedBox2BoxTransform",
    "InsideAnchorRPN",
    "MultiStageROIHeads",
    "ProposalSampler",
    "ResNetFPN",
    "ReproducibleRCNN",
    "RoundedAnchorGenerator",
    "SlimResNetFPN",
    "VGG16",
]
