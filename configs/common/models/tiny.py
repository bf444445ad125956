"""The parts that all tiny networks share: small enough to train on a CPU in minutes.

Everything is a quarter or less of the usual width, anchors fit objects of 8 to 128 pixels, and RoIs
are few, because at this size the heads cost more than the backbone.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead

from .mask_rcnn_fpn import model as _mask_rcnn
from .resnet_fpn import slim_backbone as backbone

proposal_generator = _mask_rcnn.proposal_generator
proposal_generator.head.in_channels = 64
proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
proposal_generator.batch_size_per_image = 64
proposal_generator.pre_nms_topk = (500, 200)
proposal_generator.post_nms_topk = (200, 100)

box_head = L(FastRCNNConvFCHead)(
    input_shape=L(ShapeSpec)(channels=64, height=7, width=7), conv_dims=[], fc_dims=[256, 256]
)
box_features = L(ShapeSpec)(channels=256)

mask_head = L(MaskRCNNConvUpsampleHead)(
    input_shape=L(ShapeSpec)(channels=64, width=14, height=14),
    num_classes="${model.roi_heads.num_classes}",
    conv_dims=[64, 64, 64, 64],
)
