"""Tiny HTC on the built-in shapes: everything HTC has, small enough for a CPU."""

from d2ext.config import get_config

from .models.htc_r50_fpn import model

_tiny = get_config("common/models/tiny.py")
_common = get_config("common/tiny.py")
dataloader, lr_multiplier = _common.dataloader, _common.lr_multiplier
optimizer, train = _common.optimizer, _common.train

model.backbone = _tiny.backbone
model.proposal_generator.head.in_channels = 64
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.batch_size_per_image = 64
model.proposal_generator.smooth_l1_beta = 0.1111
model.proposal_generator.pre_nms_topk = (500, 200)
model.proposal_generator.post_nms_topk = (200, 100)
_heads = model.roi_heads
_heads.num_classes = 8
for _sampler in _heads.samplers:
    _sampler.batch_size_per_image = 64
_heads.box_heads = [_tiny.box_head] * 3
for _predictor in _heads.box_predictors:
    _predictor.input_shape = _tiny.box_features
    _predictor.test_topk_per_image = 50
for _mask_head in _heads.mask_head:
    _mask_head.input_shape.channels = 64
    _mask_head.conv_dims = [64, 64, 64, 64]
_heads.box_pooler.sampling_ratio = 1
_heads.mask_pooler.sampling_ratio = 1
_heads.semantic_pooler.sampling_ratio = 1
_heads.semantic_head.in_channels = 64
_heads.semantic_head.conv_dim = 64
_heads.semantic_head.num_conv = 2
_heads.semantic_head.num_classes = 12
model.pixel_mean = [103.530, 116.280, 123.675]
model.pixel_std = [1.0, 1.0, 1.0]
model.input_format = "BGR"
dataloader.train.mapper.semantic = "auto"
dataloader.train.mapper.num_semantic_labels = "${model.roi_heads.semantic_head.num_classes}"
train.output_dir = "./output/htc_tiny"
