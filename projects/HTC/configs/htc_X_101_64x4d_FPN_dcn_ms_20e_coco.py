"""HTC X-101-64x4d with deformable convolution and multi-scale training, 20 epochs.

The strongest released model; published: box AP 50.4, mask AP 43.8.
"""

from .htc_R_101_FPN_20e_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.num_groups = 64
model.backbone.width_per_group = 4
model.backbone.deform_on_per_stage = [False, True, True, True]
model.backbone.deform_modulated = False
model.backbone.deform_num_groups = 1
_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length = [400, 1400]
_resize.sample_style = "range"
_resize.max_size = 1600
# ImageNet weights of ResNeXt-101-64x4d in detectron2's names.
train.init_checkpoint = "weights/X-101-64x4d.pkl"
train.output_dir = "./output/htc_X_101_64x4d_FPN_dcn_ms_20e_coco"
