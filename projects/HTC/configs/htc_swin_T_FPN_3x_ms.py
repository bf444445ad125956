"""HTC++ of the Swin paper over Swin-T, 36 epochs; see the yaml. Not published."""

from .models.htc_timm import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "swin_tiny_patch4_window7_224.ms_in1k"
model.backbone.bottom_up.drop_path = 0.2
model.backbone.bottom_up.global_blocks = 1
for _head in model.roi_heads.box_heads:
    _head.conv_dims = [256, 256, 256, 256]
    _head.fc_dims = [1024]
    _head.conv_norm = "GN"
train.output_dir = "./output/htc_swin_T_FPN_3x_ms"
