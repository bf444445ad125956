"""The VOC recipe with ResNet-50; nothing is published for it."""

from .fcis_R_101_voc_sds import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 50
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "./output/fcis_R_50_voc_sds"
