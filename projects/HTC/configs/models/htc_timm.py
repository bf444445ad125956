"""HTC over a network of timm: 400 to 1400 pixels, AdamW, 36 epochs; see Base-HTC-timm.yaml."""

from d2ext.config import get_config

from ..htc_R_50_FPN_1x_coco import dataloader, model, train

optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/schedule.py").lr_36_epochs

model.backbone = get_config("common/models/timm_fpn.py").backbone
model.roi_heads.soft_nms = "linear"
_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length = [400, 1400]
_resize.sample_style = "range"
_resize.max_size = 1600
optimizer.weight_decay = 0.05
optimizer.decay_matrices_only = True
train.max_iter = 263880
train.amp.enabled = True
train.init_checkpoint = ""
# The sizes are ours.
train.test_aug.min_sizes = [400, 600, 800, 1000, 1200, 1400]
train.test_aug.max_size = 1600
