"""Paper, table of depths: mask AP 29.5 on test-dev (trained on trainval)."""

from .fcis_R_101_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 152
# ImageNet weights in detectron2's names: BGR, stride in the 1x1.
train.init_checkpoint = "weights/R-152.pkl"
train.output_dir = "./output/fcis_R_152_coco"
