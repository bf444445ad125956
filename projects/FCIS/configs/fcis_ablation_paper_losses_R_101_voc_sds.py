"""Ablation: the three losses with equal weights, as in the paper's text (the release: 1, 10, 1)."""

from .fcis_R_101_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.loss_weights = [1.0, 1.0, 1.0]
train.output_dir = "./output/fcis_ablation_paper_losses_R_101_voc_sds"
