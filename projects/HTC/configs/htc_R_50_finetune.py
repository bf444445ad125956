"""Fine-tunes HTC R-50 on your own data, on one GPU of 8 GB, by the rules in docs/configs.md.

From MMDetection's weights of COCO.
"""

from d2ext.config import get_config

from .htc_R_50_FPN_20e_coco import dataloader, model, optimizer, train

_recipe = get_config("common/recipe.py")
recipe, lr_multiplier = _recipe.r50, _recipe.lr_r50
recipe.memory = [1.5, 3.2]  # 8.2 GB for two images in MMDetection's model zoo
dataloader.train.dataset = ["shapes_train"]
dataloader.test.dataset = ["shapes_val"]
dataloader.train.mapper.mask_format = "bitmask"
train.init_checkpoint = (
    "https://download.openmmlab.com/mmdetection/v2.0/htc/htc_r50_fpn_20e_coco/"
    "htc_r50_fpn_20e_coco_20200319-fe28c577.pth"
)
train.output_dir = "./output/htc_R_50_finetune"
