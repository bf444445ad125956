"""Fits a tiny HTC to your own data, on a CPU, by the rules in docs/configs.md."""

from d2ext.config import get_config

from .htc_tiny import dataloader, lr_multiplier, model, optimizer, train

recipe = get_config("common/recipe.py").tiny
train.output_dir = "./output/htc_tiny_finetune"
