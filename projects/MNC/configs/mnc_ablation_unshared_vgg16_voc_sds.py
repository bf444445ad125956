"""A backbone for each of the stages 1, 2 and 3, and nothing learned through boxes and masks."""

from .mnc_ablation_detach_vgg16_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.mask_backbone = model.backbone
model.category_backbone = model.backbone
model.roi_heads.category_in_features = ["category_conv5_3"]
model.roi_heads.num_stages = 3
train.output_dir = "./output/mnc_ablation_unshared_vgg16_voc_sds"
