"""VGG-16 as a detectron2 backbone: the thirteen convolutions of configuration D (Simonyan &
Zisserman, ICLR 2015), with Caffe's rounding of pooled sizes."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.errors import UserError

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone

# Channels of the convolutions conv{i}_1, conv{i}_2, ... of each block i.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(Backbone):
    """conv1_1 ... conv5_3, each 3x3 with ReLU; a 2x2 maximum between two blocks.

    Pooled sizes are rounded up, so that an image of n pixels gives ceil(n / 16) cells at conv5_3.
    There is no pool after the last block. Parameters: `conv{i}_{j}.weight` and `.bias`.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        freeze_at: int = 2,
        out_features: Sequence[str] = ("conv5_3",),
    ):
        """
        Args:
            in_channels: channels of the image.
            freeze_at: number of leading blocks without training; 2 keeps conv1_1 to conv2_2
                as they are, as Fast R-CNN and its successors do.
            out_features: names of the convolutions whose activations are returned.
        """
        super().__init__()
        self._names, strides, stride, channels = [], {}, 1, in_channels
        for block, widths in enumerate(_BLOCKS, start=1):
            for index, width in enumerate(widths, start=1):
                name = f"conv{block}_{index}"
                conv = nn.Conv2d(channels, width, kernel_size=3, padding=1)
                weight_init.c2_msra_fill(conv)
                conv.requires_grad_(block > freeze_at)
                self.add_module(name, conv)
                self._names.append(name)
                strides[name], channels = stride, width
            stride *= 2
        unknown = [name for name in out_features if name not in strides]
        if unknown:
            raise UserError(f"VGG16 has no layer '{unknown[0]}'; its layers are {self._names}")
        self._out_features = list(out_features)
        self._out_feature_strides = {name: strides[name] for name in out_features}
        self._out_feature_channels = {
            name: getattr(self, name).out_channels for name in out_features
        }

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        return {
            "in_channels": input_shape.channels,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: N x 3 x H x W images.

        Returns:
            name -> N x C x h x w activations after the ReLU.
        """
        outputs = {}
        for name in self._names:
            if name.endswith("_1") and name != "conv1_1":
                x = F.max_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
            x = F.relu(getattr(self, name)(x))
            if name in self._out_features:
                outputs[name] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg, input_shape: ShapeSpec) -> VGG16:
    """yaml entry point of `VGG16` (`MODEL.BACKBONE.NAME`); its output is conv5_3."""
    return VGG16(cfg, input_shape)
