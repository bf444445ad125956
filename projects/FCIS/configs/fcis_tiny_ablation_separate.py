"""Ablation: score maps of their own for detection and segmentation."""

from .fcis_tiny import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.joint = False
train.output_dir = "./output/fcis_tiny_ablation_separate"
