"""HTC over ConvNeXt-T, 36 epochs; rates as in ConvNeXt's Cascade. Not published."""

from .models.htc_timm import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "convnext_tiny.fb_in1k"
model.backbone.bottom_up.drop_path = 0.4
optimizer.lr = 2e-4
optimizer.layer_decay = 0.7
train.output_dir = "./output/htc_convnext_T"
