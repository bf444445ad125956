"""Paper, table of depths: mask AP 27.1 on test-dev (trained on trainval)."""

from .fcis_R_101_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 50
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "./output/fcis_R_50_coco"
