"""Tiny FCIS over timm's smallest ConvNeXt (3.4 million parameters), from random weights."""

from d2ext.config import get_config

from .fcis_tiny import dataloader, lr_multiplier, model, optimizer, train

_tiny = get_config("mask_rcnn_tiny_convnext.py")

model.backbone = _tiny.model.backbone
model.pixel_mean = _tiny.model.pixel_mean
model.pixel_std = _tiny.model.pixel_std
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
train.init_checkpoint = ""
train.max_iter = 1400
train.output_dir = "./output/fcis_tiny_convnext"
