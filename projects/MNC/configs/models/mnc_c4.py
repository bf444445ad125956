"""Multi-task Network Cascades on ResNet-50 or -101, "C4": regions are warped from res4.

The authors published results with ResNet-101 but neither code nor details. The head follows
detectron2's C4 models, the anchors Faster R-CNN on COCO (a fourth size of 64 pixels); everything
else is the VGG-16 network's.
"""

from d2ext.modeling import CaffeResNet
from d2ext.projects.mnc import MNCRes5CategoryHead

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .mnc_vgg16 import model

_BOX_SHAPE = L(ShapeSpec)(channels=1024, height=14, width=14)

model.backbone = L(CaffeResNet)(
    depth=50,
    norm="FrozenBN",
    freeze_at=2,
    stride_in_1x1=True,
    ceil_pool=False,
    res5_dilation=1,
    out_features=["res4"],
)
model.proposal_generator.in_features = ["res4"]
model.proposal_generator.head.in_channels = 1024
model.proposal_generator.head.num_anchors = 12
model.proposal_generator.anchor_generator.sizes = [[64, 128, 256, 512]]
# A ground truth without any anchor stays without one; the release then takes all anchors.
model.proposal_generator.match_zero_overlap = False
model.roi_heads.in_features = ["res4"]
model.roi_heads.num_classes = 80
model.roi_heads.pooler.quantize = False
model.roi_heads.mask_head.input_shape = _BOX_SHAPE
model.roi_heads.category_head = L(MNCRes5CategoryHead)(
    input_shape=_BOX_SHAPE,
    num_classes="${model.roi_heads.num_classes}",
    stride_in_1x1=True,
    norm="FrozenBN",
)
model.pixel_mean = [103.530, 116.280, 123.675]
