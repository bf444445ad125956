"""HTC R-50-FPN, 12 epochs of COCO with COCO-Stuff maps; published: box AP 42.3, mask AP 37.4."""

from d2ext.config import get_config

from .models.htc_r50_fpn import model

dataloader = get_config("common/data/coco_instance.py").dataloader
optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/schedule.py").lr_1x
train = get_config("common/train.py").train

dataloader.train.dataset = ["coco_2017_train_stuff"]
_mapper = dataloader.train.mapper
_mapper.augmentations[0].short_edge_length = [800]
_mapper.image_format = "RGB"
_mapper.mask_format = "bitmask"
# The data set's semantic maps where there are any, else maps derived from the instance masks.
_mapper.semantic = "auto"
_mapper.num_semantic_labels = "${model.roi_heads.semantic_head.num_classes}"

# MMDetection decays the norms as well; 16 images per iteration, 7330 iterations per epoch.
optimizer.weight_decay_norm = 1e-4
lr_multiplier.milestones = [58640, 80630]
lr_multiplier.warmup_iters = 500
train.max_iter = 87960
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "./output/htc_R_50_FPN_1x_coco"
