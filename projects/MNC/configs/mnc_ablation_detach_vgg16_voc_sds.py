"""Five stages and shared features, but nothing is learned through box coordinates and masks."""

from .mnc_vgg16_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_gradient = False
model.roi_heads.gate_gradient = False
train.output_dir = "./output/mnc_ablation_detach_vgg16_voc_sds"
