"""ViTDet with the plain ViT-B, from the weights of a masked autoencoder, 100 epochs.

Published: box AP 51.6, mask AP 45.9 (detectron2's project ViTDet, Mask R-CNN, at 1024 pixels).
"""

from d2ext.data import LargeScaleJitter
from d2ext.modeling import NormedConvFCHead, NormedMaskHead

from detectron2.config import LazyCall as L

from .common.models.mask_rcnn_fpn import model
from .common.models.timm_fpn import pixels
from .common.models.timm_fpn import vit_backbone as _backbone
from .common.timm import dataloader, lr_multiplier, optimizer, train

model.backbone = _backbone
model.backbone.bottom_up.pretrained = "vit_base_patch16_224.mae"
model.backbone.bottom_up.drop_path = 0.1
model.backbone.bottom_up.positions = 14
model.proposal_generator.head.conv_dims = [-1, -1]
model.roi_heads.box_head._target_ = NormedConvFCHead
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = "LN"
model.roi_heads.mask_head._target_ = NormedMaskHead
model.roi_heads.mask_head.conv_norm = "LN"
model.pixel_mean = pixels.mean
model.pixel_std = pixels.std
model.input_format = "RGB"
dataloader.train.mapper.augmentations[0] = L(LargeScaleJitter)(
    size=[1024], min_scale=0.1, max_scale=2.0
)
dataloader.train.mapper.mask_format = "bitmask"
dataloader.test.mapper.augmentations[0].short_edge_length = 1024
dataloader.test.mapper.augmentations[0].max_size = 1024
dataloader.train.total_batch_size = 64
optimizer.weight_decay = 0.1
optimizer.layer_decay = 0.7
lr_multiplier.milestones = [163889, 177546]
lr_multiplier.warmup_iters = 250
train.max_iter = 184375
train.output_dir = "./output/mask_rcnn_vitdet_B"
