"""HTC R-50-FPN without the semantic branch: needs no label maps."""

from .htc_R_50_FPN_1x_coco import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.semantic_head = None
model.roi_heads.semantic_pooler = None
dataloader.train.dataset = ["coco_2017_train"]
dataloader.train.mapper.semantic = "none"
dataloader.train.mapper.num_semantic_labels = None
train.output_dir = "./output/htc_without_semantic_R_50_FPN_1x_coco"
