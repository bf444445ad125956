"""Tiny Mask R-CNN on the built-in shapes: the baseline that trains on a CPU in minutes."""

from .common.models.mask_rcnn_fpn import model
from .common.models.tiny import backbone, box_features, box_head, mask_head, proposal_generator
from .common.tiny import dataloader, lr_multiplier, optimizer, train

model.backbone = backbone
model.proposal_generator = proposal_generator
model.roi_heads.num_classes = 8
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_head = box_head
model.roi_heads.box_predictor.input_shape = box_features
model.roi_heads.box_predictor.test_score_thresh = 0.001
model.roi_heads.box_predictor.test_topk_per_image = 50
model.roi_heads.mask_head = mask_head
model.roi_heads.box_pooler.sampling_ratio = 1
model.roi_heads.mask_pooler.sampling_ratio = 1
train.output_dir = "./output/mask_rcnn_tiny"
