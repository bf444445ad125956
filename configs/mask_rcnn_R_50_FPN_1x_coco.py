"""detectron2's Mask R-CNN R-50-FPN, 1x schedule on COCO 2017."""

from .common.train import train

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "./output/mask_rcnn_R_50_FPN_1x_coco"
