"""Train the backbone that the tiny configs start from; see dev/pretrain_tiny_backbone.py.

The same tiny Mask R-CNN with batch norm, from random weights, on the larger `shapes_big_train`,
which shares no image with the sets that the tiny configs are trained and tested on.
"""

from .mask_rcnn_tiny import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm = "BN"
model.roi_heads.box_pooler.sampling_ratio = 0
model.roi_heads.mask_pooler.sampling_ratio = 0
dataloader.train.dataset = ["shapes_big_train"]
dataloader.train.total_batch_size = 8
dataloader.test.dataset = ["shapes_big_val"]
optimizer.lr = 2e-3
optimizer.clip_gradients = dict(type="full_model", value=5.0, norm_type=2.0)
train.max_iter = 4000
train.init_checkpoint = ""
train.checkpointer.period = 250
train.output_dir = "./output/mask_rcnn_tiny_pretrain"
