"""Everything but the model of Mask R-CNN over networks of timm: see Base-RCNN-FPN-timm.yaml."""

from .data.coco_instance import dataloader
from .optim import AdamW as optimizer
from .schedule import lr_36_epochs as lr_multiplier
from .train import train

dataloader.train.mapper.augmentations[0].short_edge_length = list(range(480, 801, 32))
dataloader.train.mapper.image_format = "RGB"
optimizer.weight_decay = 0.05
optimizer.decay_matrices_only = True
train.max_iter = 263880
train.amp.enabled = True
