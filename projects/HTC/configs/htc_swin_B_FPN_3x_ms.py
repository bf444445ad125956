"""HTC++ over Swin-B from ImageNet-22K, 36 epochs.

Published: box AP 56.4, mask AP 49.1 (Swin paper, table 2c; 72 epochs and InstaBoost).
"""

from .htc_swin_T_FPN_3x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "swin_base_patch4_window7_224.ms_in22k"
model.backbone.bottom_up.drop_path = 0.3
train.output_dir = "./output/htc_swin_B_FPN_3x_ms"
