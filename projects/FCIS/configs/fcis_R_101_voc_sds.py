"""The released VOC model: no OHEM, larger anchors. Published: mAP^r 66.0 at 0.5 and 51.9 at 0.7."""

from d2ext.config import get_config

from .fcis_R_101_coco import lr_multiplier, model, optimizer, train

dataloader = get_config("common/data/voc_sds.py").dataloader
dataloader.train.total_batch_size = 4

_rpn, _heads = model.proposal_generator, model.roi_heads
_rpn.anchor_generator.sizes = [[128, 256, 512]]
_rpn.head.num_anchors = 9
_rpn.min_box_size = 16
_heads.num_classes = 20
_heads.ohem = False
_heads.sampler.batch_size_per_image = 128
_heads.sampler.background_iou = 0.1
_heads.min_size_test = 16

# 4 GPUs with one image each, gradients added up: 4 times the rate 0.0005, a quarter of the decay
# 0.0005; see fcis_R_101_coco.py.
optimizer.lr = 0.002
optimizer.weight_decay = 1.25e-4
optimizer.weight_decay_norm = 1.25e-4
# 2811 iterations are an epoch of images and their mirror images: the rate drops after 14 epochs,
# training stops after 22. The published numbers are those of epoch 21 (model_0059030.pth).
lr_multiplier.milestones = [39361]
lr_multiplier.warmup_iters = 0
train.max_iter = 61842
train.checkpointer.period = 2811
train.output_dir = "./output/fcis_R_101_voc_sds"
