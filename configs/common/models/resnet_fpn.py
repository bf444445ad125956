"""Backbones: the standard ResNet-FPN, and the narrow one of the tiny configs."""

from d2ext.modeling.backbone import ResNetFPN, SlimResNetFPN

from detectron2.config import LazyCall as L

# Caffe-lineage ResNet-50 as in detectron2's zoo: stride in the first 1x1, BGR input.
backbone = L(ResNetFPN)(
    depth=50, stride_in_1x1=True, norm="FrozenBN", freeze_at=2, out_channels=256
)

slim_backbone = L(SlimResNetFPN)(
    stem_channels=16,
    stage_channels=[32, 64, 128, 192],
    stage_blocks=[2, 2, 2, 2],
    norm="FrozenBN",
    freeze_at=0,
    out_channels=64,
    fpn_norm="",
)
