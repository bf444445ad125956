"""Everything but the model of the tiny configs: data, schedule, and the weights they start from."""

from .data.shapes import dataloader
from .optim import AdamW as optimizer
from .schedule import lr_cosine as lr_multiplier
from .train import train

optimizer.lr = 1e-3
train.max_iter = 400
# Made by dev/pretrain_tiny_backbone.py.
train.init_checkpoint = "d2ext://weights/slim_resnet_fpn_shapes.pth"
train.checkpointer.period = 200
train.test_aug.min_sizes = [96, 128, 160]
train.test_aug.max_size = 400
train.output_dir = "./output/tiny"
