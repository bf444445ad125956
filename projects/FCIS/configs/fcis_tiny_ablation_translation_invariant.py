"""Ablation: score maps without parts (k = 1)."""

from .fcis_tiny import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.group_size = 1
train.output_dir = "./output/fcis_tiny_ablation_translation_invariant"
