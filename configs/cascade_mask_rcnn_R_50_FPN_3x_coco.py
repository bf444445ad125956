"""detectron2's Cascade Mask R-CNN R-50-FPN, 3x schedule on COCO 2017."""

from .cascade_mask_rcnn_R_50_FPN_1x_coco import dataloader, model, optimizer, train
from .common.schedule import lr_3x as lr_multiplier

train.max_iter = 270000
train.output_dir = "./output/cascade_mask_rcnn_R_50_FPN_3x_coco"
