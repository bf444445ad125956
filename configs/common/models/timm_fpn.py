"""Networks of timm under a pyramid: with stages, and plain ViTs."""

from d2ext.modeling.backbone import SimpleFeaturePyramid, TimmBackbone, TimmFPN

from detectron2.config import LazyCall as L

backbone = L(TimmFPN)(
    bottom_up=L(TimmBackbone)(
        name="convnext_tiny", pretrained="hub", drop_path=0.0, out_norm="LN", checkpointing=False
    ),
    out_channels=256,
)
vit_backbone = L(SimpleFeaturePyramid)(
    bottom_up=L(TimmBackbone)(
        name="samvit_base_patch16", pretrained="hub", drop_path=0.0, checkpointing=False
    ),
    out_channels=256,
    norm="LN",
)
# Of nearly all networks; timm's `pretrained_cfg` tells.
pixels = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
