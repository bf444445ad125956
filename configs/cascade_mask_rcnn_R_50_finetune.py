"""Fine-tunes Cascade Mask R-CNN R-50 on your own data, on one GPU of 8 GB (docs/configs.md).

From detectron2's weights of COCO.
"""

from .cascade_mask_rcnn_R_50_FPN_3x_coco import dataloader, model, optimizer, train
from .common.recipe import lr_r50 as lr_multiplier
from .common.recipe import r50 as recipe

recipe.memory = [1.0, 1.5]  # 4.0 GB for two images in detectron2's model zoo
dataloader.train.dataset = ["shapes_train"]
dataloader.test.dataset = ["shapes_val"]
dataloader.train.mapper.mask_format = "bitmask"
train.init_checkpoint = (
    "detectron2://Misc/cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8.pkl"
)
train.output_dir = "./output/cascade_mask_rcnn_R_50_finetune"
