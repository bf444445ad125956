"""Mask R-CNN for small GPUs: MobileNetV4-Conv-M, 24 epochs; not published, the recipe is ours."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .mask_rcnn_swin_T import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "mobilenetv4_conv_medium.e500_r256_in1k"
model.backbone.bottom_up.drop_path = 0.075
model.backbone.bottom_up.out_norm = ""
model.backbone.out_channels = 128
model.proposal_generator.head.in_channels = 128
model.roi_heads.box_head.input_shape.channels = 128
model.roi_heads.box_head.fc_dims = [512, 512]
model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels=512)
model.roi_heads.mask_head.input_shape.channels = 128
model.roi_heads.mask_head.conv_dims = [128, 128, 128, 128, 128]
dataloader.train.mapper.augmentations[0].short_edge_length = [400, 480, 560, 640]
dataloader.train.mapper.augmentations[0].max_size = 1067
dataloader.test.mapper.augmentations[0].short_edge_length = 640
dataloader.test.mapper.augmentations[0].max_size = 1067
dataloader.train.total_batch_size = 8
lr_multiplier.milestones = [263880, 322520]
train.max_iter = 351840
train.output_dir = "./output/mask_rcnn_mobilenetv4"
