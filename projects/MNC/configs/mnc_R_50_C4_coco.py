"""MNC ResNet-50-C4 on COCO; not published, the schedule is ours."""

from d2ext.config import get_config

from .models.mnc_c4 import model

dataloader = get_config("common/data/coco_instance.py").dataloader
optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/schedule.py").lr_1x
train = get_config("common/train.py").train

dataloader.train.total_batch_size = 8
dataloader.train.mapper.mask_format = "bitmask"
for _mapper in (dataloader.train.mapper, dataloader.test.mapper):
    _mapper.augmentations[0].max_size = 1000
dataloader.train.mapper.augmentations[0].short_edge_length = [600]
dataloader.test.mapper.augmentations[0].short_edge_length = 600

optimizer.lr = 1e-3
optimizer.weight_decay = 5e-4
optimizer.bias_lr_factor = 2.0
lr_multiplier.milestones = [160000, 213333]
lr_multiplier.warmup_iters = 500
train.max_iter = 240000
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "./output/mnc_R_50_C4_coco"
