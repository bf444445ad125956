"""Building blocks of the models; importing this package registers them for yaml configs."""

from d2ext import compat

compat.patch_structures()

from .anchors import RoundedAnchorGenerator  # noqa: E402
from .backbone import VGG16, CaffeResNet, ResNetFPN, SlimResNetFPN  # noqa: E402
from .box_refinement import ClampedBox2BoxTransform, refine_boxes  # noqa: E402
from .losses import global_mean_count  # noqa: E402
from .meta_arch import MultiStageRCNN  # noqa: E402
from .roi_heads import MultiStageROIHeads  # noqa: E402
from .rpn import InsideAnchorRPN  # noqa: E402
from .rpn_caffe import CaffeRPN  # noqa: E402
from .sampling import ProposalSampler, image_generator, image_seeds  # noqa: E402

__all__ = [
    "CaffeRPN",
    "CaffeResNet",
    "ClampedBox2BoxTransform",
    "InsideAnchorRPN",
    "MultiStageRCNN",
    "MultiStageROIHeads",
    "ProposalSampler",
    "ResNetFPN",
    "RoundedAnchorGenerator",
    "SlimResNetFPN",
    "VGG16",
    "global_mean_count",
    "image_generator",
    "image_seeds",
    "refine_boxes",
]
