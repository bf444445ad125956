"""Ablation, row 1: three box and three mask heads in parallel (Cascade Mask R-CNN)."""

from .htc_tiny import dataloader, lr_multiplier, model, optimizer, train

_heads = model.roi_heads
_heads.interleaved = False
_heads.mask_info_flow = False
for _head in _heads.mask_head:
    _head.information_flow = False
_heads.semantic_head = None
_heads.semantic_pooler = None
dataloader.train.mapper.semantic = "none"
dataloader.train.mapper.num_semantic_labels = None
train.output_dir = "./output/htc_tiny_ablation_cascade"
