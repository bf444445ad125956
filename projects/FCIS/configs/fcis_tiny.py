"""Tiny FCIS on the built-in shapes: score maps and RPN on the finest pyramid level."""

from d2ext.config import get_config
from d2ext.modeling import ClampedBox2BoxTransform

from detectron2.config import LazyCall as L

from .models.fcis_r101 import model

_common = get_config("common/tiny.py")
dataloader, lr_multiplier = _common.dataloader, _common.lr_multiplier
optimizer, train = _common.optimizer, _common.train

model.backbone = get_config("common/models/tiny.py").backbone
_rpn, _heads = model.proposal_generator, model.roi_heads
_rpn.in_features = ["p2"]
_rpn.head.in_channels = 64
_rpn.head.conv_dims = [-1]
_rpn.anchor_generator.sizes = [[12, 24, 48, 96]]
_rpn.anchor_generator.strides = [4]
_rpn.match_zero_overlap = False
_rpn.box2box_transform = L(ClampedBox2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0])
_rpn.batch_size_per_image = 128
_rpn.pre_nms_topk = (1000, 1000)
_rpn.post_nms_topk = (200, 150)
_rpn.min_box_size = 4
_heads.num_classes = 8
_heads.in_feature = "p2"
_heads.in_channels = 64
_heads.stride = 4
_heads.conv_dim = 128
_heads.conv_kernel = 3
# With 64, the hardest regions would all be positives.
_heads.batch_size_per_image = 128
_heads.box2box_transform = L(ClampedBox2BoxTransform)(weights=[5.0, 5.0, 2.0, 2.0])
_heads.min_size_test = 4
_heads.voting.max_per_image = 50
model.pixel_mean = [103.530, 116.280, 123.675]
train.max_iter = 900
train.output_dir = "./output/fcis_tiny"
