"""Ablation: score maps without parts (k = 1). Paper: mAP^r 52.5 at 0.5 and 38.5 at 0.7."""

from .fcis_R_101_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.group_size = 1
train.output_dir = "./output/fcis_ablation_translation_invariant_R_101_voc_sds"
