"""HTC++ over Swin-S, 36 epochs. Not published."""

from .htc_swin_T_FPN_3x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "swin_small_patch4_window7_224.ms_in1k"
model.backbone.bottom_up.drop_path = 0.2
train.output_dir = "./output/htc_swin_S_FPN_3x_ms"
