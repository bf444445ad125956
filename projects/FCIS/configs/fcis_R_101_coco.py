"""The released COCO model; published: mask AP 29.2 on minival (= val2017), 29.6 on test-dev."""

from d2ext.config import get_config

from .models.fcis_r101 import model

dataloader = get_config("common/data/coco_instance.py").dataloader
optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/schedule.py").lr_1x
train = get_config("common/train.py").train

dataloader.train.total_batch_size = 8
dataloader.train.mapper.mask_format = "bitmask"
for _mapper, _sides in ((dataloader.train.mapper, [600]), (dataloader.test.mapper, 600)):
    _mapper.augmentations[0].short_edge_length = _sides
    _mapper.augmentations[0].max_size = 1000

# The release adds up the gradients of its 8 GPUs, with learning rate 0.0005 and weight decay
# 0.0005; here they are averaged. The same steps result from 8 times the rate and an eighth of the
# decay (which is multiplied by the rate and applied once per step).
optimizer.lr = 0.004
optimizer.weight_decay = 6.25e-5
# Scales decay like weights, biases do not.
optimizer.weight_decay_norm = 6.25e-5
optimizer.weight_decay_bias = 0.0
optimizer.lr_multipliers = [["roi_heads.conv_new", 3.0]]
# 5.33 and 8 epochs of images and their mirror images.
lr_multiplier.milestones = [156000]
lr_multiplier.warmup_method = "constant"
lr_multiplier.warmup_factor = 0.1
lr_multiplier.warmup_iters = 250
train.max_iter = 235000
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.output_dir = "./output/fcis_R_101_coco"
