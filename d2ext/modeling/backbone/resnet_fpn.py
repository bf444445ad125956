"""ResNet-FPN backbones that one class serves to yaml and lazy configs alike: the standard depths
(with deformable stages and fixed-statistics batch norm), and a narrow net of basic blocks for CPUs.
"""

from collections.abc import Callable, Sequence

from d2ext.errors import UserError
from d2ext.modeling.backbone.deform import DeformBottleneckBlock
from d2ext.modeling.backbone.norm import resolve_norm

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet

Norm = str | Callable
_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class _ResNetFPNBase(FPN):
    """FPN with one max-pooled extra level; over res2..res5 the features are p2..p6."""

    def __init__(
        self, bottom_up: ResNet, out_channels: int, fpn_norm: Norm, in_features: Sequence[str]
    ):
        in_features = list(in_features)
        top_block = LastLevelMaxPool()
        top_block.in_feature = in_features[-1].replace("res", "p")
        super().__init__(
            bottom_up=bottom_up,
            in_features=in_features,
            out_channels=out_channels,
            norm=resolve_norm(fpn_norm),
            top_block=top_block,
        )


class ResNetFPN(_ResNetFPNBase):
    """ResNet or ResNeXt of bottleneck blocks with FPN; parameter names as in detectron2.

    Equal to `build_resnet_fpn_backbone` of detectron2, except that deformable stages train on
    CPUs and that the norm may be "EvalStatsBN".
    """

    @configurable
    def __init__(
        self,
        *,
        depth: int = 50,
        in_channels: int = 3,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        num_groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        norm: Norm = "FrozenBN",
        freeze_at: int = 2,
        deform_on_per_stage: Sequence[bool] = (False, False, False, False),
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        in_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        out_channels: int = 256,
        fpn_norm: Norm = "",
    ):
        """
        Args:
            depth: 50, 101 or 152.
            stem_out_channels, res2_out_channels: channels at stride 4 before and after res2;
                the later stages double them.
            num_groups, width_per_group: groups of the 3x3 convolutions and channels of each
                group in res2 (ResNeXt-101-64x4d: 64 and 4).
            stride_in_1x1: True for weights of the original MSRA ResNets, False for
                torchvision's.
            norm, fpn_norm: norm of bottom-up net and pyramid, see `resolve_norm`.
            freeze_at: number of leading stages without training (1: stem, 2: + res2).
            deform_on_per_stage: for res2..res5, whether their 3x3 convolutions are deformable.
            deform_modulated: use the modulated form (DCNv2) of deformable convolution.
            deform_num_groups: offset groups of deformable convolution.
            in_features: stages that feed the pyramid.
            out_channels: channels of every pyramid level.
        """
        if depth not in _BLOCKS:
            raise UserError(f"ResNetFPN: depth {depth} is none of {sorted(_BLOCKS)}")
        norm = resolve_norm(norm)
        stages, channels, outputs = [], stem_out_channels, res2_out_channels
        bottleneck = num_groups * width_per_group
        for index, (blocks, deform) in enumerate(zip(_BLOCKS[depth], deform_on_per_stage)):
            extra = {}
            if deform:
                extra = {
                    "deform_modulated": deform_modulated,
                    "deform_num_groups": deform_num_groups,
                }
            stages.append(
                ResNet.make_stage(
                    DeformBottleneckBlock if deform else BottleneckBlock,
                    blocks,
                    in_channels=channels,
                    out_channels=outputs,
                    bottleneck_channels=bottleneck,
                    stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                    num_groups=num_groups,
                    norm=norm,
                    stride_in_1x1=stride_in_1x1,
                    **extra,
                )
            )
            channels, outputs, bottleneck = outputs, outputs * 2, bottleneck * 2
        stem = BasicStem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm)
        bottom_up = ResNet(stem, stages, out_features=list(in_features), freeze_at=freeze_at)
        super().__init__(bottom_up, out_channels, fpn_norm, in_features)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        resnet = cfg.MODEL.RESNETS
        if resnet.RES5_DILATION != 1:
            raise UserError("ResNetFPN has no dilated res5: set MODEL.RESNETS.RES5_DILATION 1")
        return {
            "depth": resnet.DEPTH,
            "in_channels": input_shape.channels,
            "stem_out_channels": resnet.STEM_OUT_CHANNELS,
            "res2_out_channels": resnet.RES2_OUT_CHANNELS,
            "num_groups": resnet.NUM_GROUPS,
            "width_per_group": resnet.WIDTH_PER_GROUP,
            "stride_in_1x1": resnet.STRIDE_IN_1X1,
            "norm": resnet.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "deform_on_per_stage": resnet.DEFORM_ON_PER_STAGE,
            "deform_modulated": resnet.DEFORM_MODULATED,
            "deform_num_groups": resnet.DEFORM_NUM_GROUPS,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "fpn_norm": cfg.MODEL.FPN.NORM,
        }


class SlimResNetFPN(_ResNetFPNBase):
    """A ResNet-18-like net of any width with FPN, for training on CPUs.

    detectron2 fixes res2 of its ResNet-18 at 64 channels; here every stage is free. Names are those
    of detectron2's basic blocks (`bottom_up.res2.0.conv1.weight` ...).
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        stem_channels: int = 16,
        stage_channels: Sequence[int] = (32, 64, 128, 256),
        stage_blocks: Sequence[int] = (2, 2, 2, 2),
        norm: Norm = "GN",
        freeze_at: int = 0,
        in_features: Sequence[str] | None = None,
        out_channels: int = 64,
        fpn_norm: Norm = "",
    ):
        """
        Args:
            stem_channels: channels of the 7x7 stem.
            stage_channels, stage_blocks: channels and number of basic blocks of res2, res3, ...;
                from res3 on the channels must change at every stage, because the projection that
                carries the stride of the shortcut exists only there.
            norm, fpn_norm: norm of bottom-up net and pyramid, see `resolve_norm`.
            freeze_at: number of leading stages without training.
            in_features: stages that feed the pyramid; None for all.
            out_channels: channels of every pyramid level.
        """
        stage_channels, norm = list(stage_channels), resolve_norm(norm)
        if len(stage_channels) != len(stage_blocks):
            raise UserError("SlimResNetFPN: stage_channels and stage_blocks differ in length")
        if any(a == b for a, b in zip(stage_channels, stage_channels[1:])):
            raise UserError(
                f"SlimResNetFPN: stage_channels {stage_channels} must differ between neighbours"
            )
        stages = [
            ResNet.make_stage(
                BasicBlock,
                blocks,
                in_channels=before,
                out_channels=after,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                norm=norm,
            )
            for index, (before, after, blocks) in enumerate(
                zip([stem_channels] + stage_channels, stage_channels, stage_blocks)
            )
        ]
        if in_features is None:
            in_features = [f"res{index + 2}" for index in range(len(stages))]
        stem = BasicStem(in_channels=in_channels, out_channels=stem_channels, norm=norm)
        bottom_up = ResNet(stem, stages, out_features=list(in_features), freeze_at=freeze_at)
        super().__init__(bottom_up, out_channels, fpn_norm, in_features)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        return {
            "in_channels": input_shape.channels,
            "stem_channels": cfg.MODEL.SLIM_RESNET.STEM_CHANNELS,
            "stage_channels": cfg.MODEL.SLIM_RESNET.STAGE_CHANNELS,
            "stage_blocks": cfg.MODEL.SLIM_RESNET.STAGE_BLOCKS,
            "norm": cfg.MODEL.RESNETS.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_features": cfg.MODEL.FPN.IN_FEATURES,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "fpn_norm": cfg.MODEL.FPN.NORM,
        }


@BACKBONE_REGISTRY.register()
def build_slim_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> SlimResNetFPN:
    """yaml entry point of `SlimResNetFPN` (`MODEL.BACKBONE.NAME`)."""
    return SlimResNetFPN(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_deform_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> ResNetFPN:
    """yaml entry point of `ResNetFPN`, whose deformable stages run on CPUs."""
    return ResNetFPN(cfg, input_shape)
