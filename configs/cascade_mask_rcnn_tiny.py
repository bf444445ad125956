"""Tiny Cascade Mask R-CNN (detectron2's: three box heads, one mask head) on the built-in shapes."""

from .common.models.cascade_mask_rcnn_fpn import model
from .common.models.tiny import backbone, box_features, box_head, mask_head, proposal_generator
from .common.tiny import dataloader, lr_multiplier, optimizer, train

model.backbone = backbone
model.proposal_generator = proposal_generator
model.roi_heads.num_classes = 8
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_heads = [box_head] * 3
for _predictor in model.roi_heads.box_predictors:
    _predictor.input_shape = box_features
    _predictor.test_score_thresh = 0.001
    _predictor.test_topk_per_image = 50
model.roi_heads.mask_head = mask_head
model.roi_heads.box_pooler.sampling_ratio = 1
model.roi_heads.mask_pooler.sampling_ratio = 1
train.output_dir = "./output/cascade_mask_rcnn_tiny"
