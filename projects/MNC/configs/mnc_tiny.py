"""Tiny MNC on the built-in shapes: everything MNC has, small enough for a CPU."""

from d2ext.config import get_config

from .models.mnc_vgg16 import model

_common = get_config("common/tiny.py")
dataloader, lr_multiplier = _common.dataloader, _common.lr_multiplier
optimizer, train = _common.optimizer, _common.train

model.backbone = get_config("common/models/tiny.py").backbone
_rpn = model.proposal_generator
_rpn.in_features = ["p2"]
_rpn.head.in_channels = 64
_rpn.head.num_anchors = 15
_rpn.anchor_generator.sizes = [[8, 16, 32, 64, 128]]
_rpn.anchor_generator.strides = [4]
_rpn.batch_size_per_image = 64
_rpn.pre_nms_topk = (1000, 500)
_rpn.post_nms_topk = (200, 60)
_rpn.min_box_size = 4
_rpn.scale_min_size = False
_rpn.match_zero_overlap = False
_heads = model.roi_heads
_heads.num_classes = 8
_heads.in_features = ["p2"]
_heads.pooler.scale = 1 / 4
_heads.pooler.quantize = False
_heads.mask_head.input_shape.channels = 64
_heads.category_head.input_shape.channels = 64
_heads.category_head.fc_dim = 256
model.voting.max_per_image = 50
model.pixel_mean = [103.530, 116.280, 123.675]
train.output_dir = "./output/mnc_tiny"
