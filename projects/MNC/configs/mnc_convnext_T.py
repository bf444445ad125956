"""MNC over ConvNeXt-T, whose last stage is dilated to stride 16; not published."""

from d2ext.config import get_config
from d2ext.modeling.backbone import TimmBackbone
from d2ext.projects.mnc import MNCCategoryHead

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .mnc_R_50_C4_coco import dataloader, lr_multiplier, model, train

_pixels = get_config("common/models/timm_fpn.py").pixels
optimizer = get_config("common/optim.py").AdamW

_box_shape = L(ShapeSpec)(channels=768, height=14, width=14)
model.backbone = L(TimmBackbone)(
    name="convnext_tiny.fb_in1k",
    pretrained="hub",
    out_features=["res5"],
    output_stride=16,
    drop_path=0.4,
    out_norm="LN",
)
model.proposal_generator.in_features = ["res5"]
model.proposal_generator.head.in_channels = 768
model.roi_heads.in_features = ["res5"]
model.roi_heads.mask_head.input_shape = _box_shape
model.roi_heads.category_head = L(MNCCategoryHead)(
    input_shape=_box_shape, num_classes="${model.roi_heads.num_classes}", fc_dim=1024
)
model.pixel_mean = _pixels.mean
model.pixel_std = _pixels.std
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
optimizer.weight_decay = 0.05
optimizer.decay_matrices_only = True
optimizer.layer_decay = 0.95
lr_multiplier.warmup_iters = 1000
train.amp.enabled = True
train.init_checkpoint = ""
train.output_dir = "./output/mnc_convnext_T"
