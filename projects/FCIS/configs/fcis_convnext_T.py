"""FCIS over ConvNeXt-T, whose last stage is dilated to stride 16; not published."""

from d2ext.config import get_config
from d2ext.modeling.backbone import TimmBackbone

from detectron2.config import LazyCall as L

from .fcis_R_101_coco import dataloader, model, train

_pixels = get_config("common/models/timm_fpn.py").pixels
optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/schedule.py").lr_1x

model.backbone = L(TimmBackbone)(
    name="convnext_tiny.fb_in1k",
    pretrained="hub",
    out_features=["res4", "res5"],
    output_stride=16,
    drop_path=0.4,
    out_norm="LN",
)
model.proposal_generator.head.in_channels = 384
model.roi_heads.in_channels = 768
model.pixel_mean = _pixels.mean
model.pixel_std = _pixels.std
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
optimizer.weight_decay = 0.05
optimizer.decay_matrices_only = True
optimizer.layer_decay = 0.95
optimizer.lr_multipliers = [["roi_heads.conv_new", 3.0]]
lr_multiplier.milestones = [156000]
train.amp.enabled = True
train.init_checkpoint = ""
train.output_dir = "./output/fcis_convnext_T"
