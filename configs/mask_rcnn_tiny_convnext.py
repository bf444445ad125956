"""Tiny Mask R-CNN over timm's smallest ConvNeXt (3.4 million parameters), from random weights."""

from d2ext.modeling.backbone import TimmBackbone, TimmFPN

from detectron2.config import LazyCall as L

from .mask_rcnn_tiny import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TimmFPN)(
    bottom_up=L(TimmBackbone)(name="convnext_atto", pretrained="", drop_path=0.05, out_norm="LN"),
    out_channels=64,
)
# timm's statistics, also of the weights that pretrained="hub" would load.
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
dataloader.test.mapper.image_format = "RGB"
train.init_checkpoint = ""
train.max_iter = 900
train.output_dir = "./output/mask_rcnn_tiny_convnext"
