"""Trained with three stages, tested with five as in the paper; published: mAP^r 62.6 at IoU 0.5."""

from .mnc_vgg16_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.num_stages = 3
train.output_dir = "./output/mnc_3stage_vgg16_voc_sds"
