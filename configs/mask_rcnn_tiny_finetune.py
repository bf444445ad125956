"""Fits a tiny Mask R-CNN to your own data, on a CPU, by the rules in docs/configs.md."""

from .common.recipe import tiny as recipe
from .mask_rcnn_tiny import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "./output/mask_rcnn_tiny_finetune"
