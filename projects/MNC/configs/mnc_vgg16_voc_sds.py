"""MNC VGG-16, five stages, VOC SDS; published: mAP^r 65.0 at IoU 0.5, 46.3 at 0.7 (release), 63.5
and 41.5 (paper)."""

from d2ext.config import get_config

from .models.mnc_vgg16 import model

dataloader = get_config("common/data/voc_sds.py").dataloader
optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/schedule.py").lr_1x
train = get_config("common/train.py").train

# The release runs 8 images one by one and averages their gradients before a step; its losses are
# averages per image. Here they are averaged per image, then over the 8 images of an iteration: the
# same gradient, hence the same learning rate and number of iterations. No warm-up.
optimizer.lr = 1e-3
optimizer.weight_decay = 5e-4
optimizer.bias_lr_factor = 2.0
lr_multiplier.milestones = [20000]
lr_multiplier.warmup_iters = 0
train.max_iter = 25000
train.init_checkpoint = "weights/VGG16.mask.caffemodel"
train.output_dir = "./output/mnc_vgg16_voc_sds"
