"""FCIS with the input size and schedule of Mask R-CNN's time: not in the paper, not measured."""

from d2ext.modeling import ClampedBox2BoxTransform

from detectron2.config import LazyCall as L

from .fcis_R_50_coco import dataloader, lr_multiplier, model, optimizer, train

# Smaller objects: one more anchor size; twice as many regions; growth of boxes limited.
_rpn, _heads = model.proposal_generator, model.roi_heads
_rpn.anchor_generator.sizes = [[32, 64, 128, 256, 512]]
_rpn.head.num_anchors = 15
_rpn.match_zero_overlap = False
_rpn.box2box_transform = L(ClampedBox2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0])
_rpn.pre_nms_topk = (12000, 6000)
_rpn.post_nms_topk = (1000, 500)
_heads.batch_size_per_image = 256
_heads.box2box_transform = L(ClampedBox2BoxTransform)(weights=[5.0, 5.0, 2.0, 2.0])

_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length = [640, 672, 704, 736, 768, 800]
_resize.max_size = 1333
dataloader.test.mapper.augmentations[0].short_edge_length = 800
dataloader.test.mapper.augmentations[0].max_size = 1333

# 16 images per iteration, twice the rate of 8, half the decay; 12 epochs.
dataloader.train.total_batch_size = 16
optimizer.lr = 0.008
optimizer.weight_decay = 3.125e-5
optimizer.weight_decay_norm = 3.125e-5
lr_multiplier.milestones = [60000, 80000]
lr_multiplier.warmup_method = "linear"
lr_multiplier.warmup_factor = 0.001
lr_multiplier.warmup_iters = 1000
train.max_iter = 90000
train.output_dir = "./output/fcis_R_50_800px_coco"
