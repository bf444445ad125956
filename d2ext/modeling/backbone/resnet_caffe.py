"""ResNets as MNC and FCIS use them: the Caffe weights' layout, dilation instead of stride in res5,
and feature maps of stride 16 without a pyramid."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling.backbone.norm import resolve_norm
from d2ext.modeling.backbone.resnet_fpn import _BLOCKS

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet


class CaffeStem(BasicStem):
    """detectron2's stem whose max pooling does not pad but rounds the output size up, as in Caffe.

    detectron2 pads by one pixel on all sides, which shifts every feature by one stem pixel and, for
    some sizes, gives one cell more (an image of 562 pixels: 36 cells of stride 16 instead of 35).
    """

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> N x C x about H/4 x about W/4."""
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=0, ceil_mode=True)


class CaffeResNet(ResNet):
    """ResNet-50, -101 or -152 of bottleneck blocks, without a pyramid; detectron2's names."""

    @configurable
    def __init__(
        self,
        *,
        depth: int = 101,
        in_channels: int = 3,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        width_per_group: int = 64,
        norm: str | Callable = "EvalStatsBN",
        freeze_at: int = 2,
        stride_in_1x1: bool = True,
        res5_dilation: int = 2,
        ceil_pool: bool = True,
        out_features: Sequence[str] = ("res4", "res5"),
    ):
        """
        Args:
            depth: 50, 101 or 152.
            stem_out_channels, res2_out_channels: channels at stride 4 before and after res2;
                the later stages double them.
            width_per_group: channels of the 3x3 convolutions of res2.
            norm: see `resolve_norm`. "EvalStatsBN" trains scale and bias with fixed
                statistics, as FCIS does; "FrozenBN" trains nothing.
            freeze_at: number of leading stages without training (1: stem, 2: + res2).
            stride_in_1x1: the stride sits in the first 1x1 convolution (Caffe weights).
            res5_dilation: 2 keeps res5 at stride 16 ("hole algorithm"; all its 3x3
                convolutions are dilated); 1 gives stride 32.
            ceil_pool: `CaffeStem` instead of detectron2's stem.
            out_features: stages to return.
        """
        if depth not in _BLOCKS:
            raise UserError(f"CaffeResNet: depth {depth} is none of {sorted(_BLOCKS)}")
        if res5_dilation not in (1, 2):
            raise UserError(f"CaffeResNet: res5_dilation {res5_dilation} is neither 1 nor 2")
        norm = resolve_norm(norm)
        stages, channels, outputs = [], stem_out_channels, res2_out_channels
        bottleneck = width_per_group
        for index, blocks in enumerate(_BLOCKS[depth]):
            dilation = res5_dilation if index == 3 else 1
            stride = 1 if index == 0 or dilation > 1 else 2
            stages.append(
                ResNet.make_stage(
                    BottleneckBlock,
                    blocks,
                    in_channels=channels,
                    out_channels=outputs,
                    bottleneck_channels=bottleneck,
                    stride_per_block=[stride] + [1] * (blocks - 1),
                    norm=norm,
                    stride_in_1x1=stride_in_1x1,
                    dilation=dilation,
                )
            )
            channels, outputs, bottleneck = outputs, outputs * 2, bottleneck * 2
        stem = CaffeStem if ceil_pool else BasicStem
        super().__init__(
            stem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm),
            stages,
            out_features=list(out_features),
            freeze_at=freeze_at,
        )

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        resnet = cfg.MODEL.RESNETS
        return {
            "depth": resnet.DEPTH,
            "in_channels": input_shape.channels,
            "stem_out_channels": resnet.STEM_OUT_CHANNELS,
            "res2_out_channels": resnet.RES2_OUT_CHANNELS,
            "width_per_group": resnet.WIDTH_PER_GROUP,
            "norm": resnet.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "stride_in_1x1": resnet.STRIDE_IN_1X1,
            "res5_dilation": resnet.RES5_DILATION,
            "ceil_pool": cfg.MODEL.CAFFE_RESNET.CEIL_POOL,
            "out_features": resnet.OUT_FEATURES,
        }


@BACKBONE_REGISTRY.register()
def build_caffe_resnet_backbone(cfg, input_shape: ShapeSpec) -> CaffeResNet:
    """yaml entry point of `CaffeResNet` (`MODEL.BACKBONE.NAME`)."""
    return CaffeResNet(cfg, input_shape)
