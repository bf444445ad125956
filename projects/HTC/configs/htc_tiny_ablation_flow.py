"""Ablation, row 3: row 2 plus mask information flow; row 4 is htc_tiny."""

from .htc_tiny import dataloader, lr_multiplier, model, optimizer, train

_heads = model.roi_heads
_heads.interleaved = True
_heads.mask_info_flow = True
_heads.semantic_head = None
_heads.semantic_pooler = None
dataloader.train.mapper.semantic = "none"
dataloader.train.mapper.num_semantic_labels = None
train.output_dir = "./output/htc_tiny_ablation_flow"
