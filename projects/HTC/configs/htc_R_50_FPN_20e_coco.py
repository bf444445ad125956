"""HTC R-50-FPN, 20 epochs; published: box AP 43.3, mask AP 38.3."""

from .htc_R_50_FPN_1x_coco import dataloader, lr_multiplier, model, optimizer, train

lr_multiplier.milestones = [117280, 139270]
train.max_iter = 146600
train.output_dir = "./output/htc_R_50_FPN_20e_coco"
