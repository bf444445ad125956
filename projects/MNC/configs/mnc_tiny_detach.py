"""mnc_tiny with all boxes as constants: nothing is learned through their coordinates."""

from .mnc_tiny import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_gradient = False
train.output_dir = "./output/mnc_tiny_detach"
