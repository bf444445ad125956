"""Ablation: score maps of their own for detection and segmentation. Paper: 63.9 at 0.5, 49.7 at
0.7."""

from .fcis_R_101_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.joint = False
train.output_dir = "./output/fcis_ablation_separate_R_101_voc_sds"
