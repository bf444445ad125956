"""mnc_tiny trained with three stages; tested with five, as the paper does."""

from .mnc_tiny import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.num_stages = 3
train.output_dir = "./output/mnc_tiny_3stage"
