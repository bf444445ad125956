"""MNC ResNet-101-C4 on COCO; published, for other training data and an unknown schedule: mask AP
24.6."""

from .mnc_R_50_C4_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.output_dir = "./output/mnc_R_101_C4_coco"
