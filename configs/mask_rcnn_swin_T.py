"""Mask R-CNN over Swin-T, 3x.

Published: box AP 46.0, mask AP 41.6 (Swin's repository of detectors).
"""

from .common.models.mask_rcnn_fpn import model
from .common.models.timm_fpn import backbone, pixels
from .common.timm import dataloader, lr_multiplier, optimizer, train

model.backbone = backbone
model.backbone.bottom_up.name = "swin_tiny_patch4_window7_224.ms_in1k"
model.backbone.bottom_up.drop_path = 0.2
model.pixel_mean = pixels.mean
model.pixel_std = pixels.std
model.input_format = "RGB"
train.output_dir = "./output/mask_rcnn_swin_T"
