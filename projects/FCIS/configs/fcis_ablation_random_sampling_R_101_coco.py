"""Ablation: 128 random regions instead of OHEM. Paper: mask AP 28.8 on test-dev (29.2 with
OHEM)."""

from .fcis_R_101_coco import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.ohem = False
model.roi_heads.sampler.batch_size_per_image = 128
train.output_dir = "./output/fcis_ablation_random_sampling_R_101_coco"
