"""detectron2's Mask R-CNN R-50-FPN, 1x schedule on COCO 2017."""

from .common.data.coco_instance import dataloader
from .common.models.mask_rcnn_fpn import model
from .common.optim import SGD as optimizer
from .common.schedule import lr_1x as lr_multiplier
from .common.train import train

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "./output/mask_rcnn_R_50_FPN_1x_coco"
