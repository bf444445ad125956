"""Fits a tiny MNC to your own data, on a CPU, by the rules in docs/configs.md."""

from d2ext.config import get_config

from .mnc_tiny import dataloader, lr_multiplier, model, optimizer, train

recipe = get_config("common/recipe.py").tiny
recipe.short_side = [128, 256]  # its single feature map has stride 4
train.output_dir = "./output/mnc_tiny_finetune"
