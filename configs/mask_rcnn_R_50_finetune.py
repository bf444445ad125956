"""Fine-tunes Mask R-CNN R-50 on your own data, on one GPU of 8 GB, by the rules in docs/configs.md.

From detectron2's weights of COCO.
"""

from .common.recipe import lr_r50 as lr_multiplier
from .common.recipe import r50 as recipe
from .mask_rcnn_R_50_FPN_3x_coco import dataloader, model, optimizer, train

dataloader.train.dataset = ["shapes_train"]
dataloader.test.dataset = ["shapes_val"]
dataloader.train.mapper.mask_format = "bitmask"
train.init_checkpoint = (
    "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"
)
train.output_dir = "./output/mask_rcnn_R_50_finetune"
