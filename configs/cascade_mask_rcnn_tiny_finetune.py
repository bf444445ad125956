"""Fits a tiny Cascade Mask R-CNN to your own data, on a CPU, by the rules in docs/configs.md."""

from .cascade_mask_rcnn_tiny import dataloader, lr_multiplier, model, optimizer, train
from .common.recipe import tiny as recipe

train.output_dir = "./output/cascade_mask_rcnn_tiny_finetune"
