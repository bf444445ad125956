"""Ablation, row 1: three box and three mask heads in parallel; paper: box AP 42.5, mask AP 36.5."""

from .htc_R_50_FPN_20e_coco import dataloader, lr_multiplier, model, optimizer, train

_heads = model.roi_heads
_heads.interleaved = False
_heads.mask_info_flow = False
for _head in _heads.mask_head:
    _head.information_flow = False
_heads.semantic_head = None
_heads.semantic_pooler = None
dataloader.train.dataset = ["coco_2017_train"]
dataloader.train.mapper.semantic = "none"
dataloader.train.mapper.num_semantic_labels = None
train.output_dir = "./output/htc_ablation_cascade_R_50_FPN_20e_coco"
