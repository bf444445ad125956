"""Mask R-CNN over ConvNeXt-T, 3x.

Published: box AP 46.2, mask AP 41.7 (ConvNeXt paper, table 3).
"""

from .mask_rcnn_swin_T import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "convnext_tiny.fb_in1k"
model.backbone.bottom_up.drop_path = 0.4
optimizer.layer_decay = 0.95
train.output_dir = "./output/mask_rcnn_convnext_T"
