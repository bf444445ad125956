"""Fine-tunes MNC R-50 on your own data, on one GPU of 8 GB, by the rules in docs/configs.md.

From ImageNet weights; its authors released VGG-16 only.
"""

from d2ext.config import get_config

from .mnc_R_50_C4_coco import dataloader, model, optimizer, train

_recipe = get_config("common/recipe.py")
recipe, lr_multiplier = _recipe.r50, _recipe.lr_r50
recipe.memory = [1.0, 2.5]  # an estimate
recipe.rate = [0.001, 8.0]
recipe.anchors = "fit"
recipe.short_side = [480, 600]
dataloader.train.dataset = ["shapes_train"]
dataloader.test.dataset = ["shapes_val"]
dataloader.train.mapper.mask_format = "bitmask"
train.output_dir = "./output/mnc_R_50_finetune"
