"""Mask Scoring R-CNN R-50-FPN, 1x schedule on COCO 2017."""

from d2ext.config import get_config
from mask_scoring import MaskIoUHead, MaskScoringROIHeads

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

_base = get_config("mask_rcnn_R_50_FPN_1x_coco.py")
model, dataloader, optimizer = _base.model, _base.dataloader, _base.optimizer
lr_multiplier, train = _base.lr_multiplier, _base.train

model.roi_heads._target_ = MaskScoringROIHeads
model.roi_heads.mask_iou_head = L(MaskIoUHead)(
    input_shape=L(ShapeSpec)(channels=256, height=14, width=14),
    num_classes="${model.roi_heads.num_classes}",
    conv_dim=256,
    fc_dim=1024,
)
model.roi_heads.rescore = True
dataloader.train.mapper.mask_format = "bitmask"
train.output_dir = "./output/mask_scoring_R_50_FPN_1x_coco"
