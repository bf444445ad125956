"""mnc_tiny with a backbone for each of the stages 1, 2 and 3, and boxes and masks as constants."""

from .mnc_tiny_3stage import dataloader, lr_multiplier, model, optimizer, train

model.mask_backbone = model.backbone
model.category_backbone = model.backbone
model.roi_heads.category_in_features = ["category_p2"]
model.roi_heads.box_gradient = False
model.roi_heads.gate_gradient = False
train.output_dir = "./output/mnc_tiny_unshared"
