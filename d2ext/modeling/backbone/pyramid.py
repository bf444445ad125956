"""The pyramid of ViTDet: every level is made of the last feature map of a plain transformer."""

import math

from torch import Tensor, nn

from d2ext.modeling.backbone.norm import resolve_norm

from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


class SimpleFeaturePyramid(Backbone):
    """Levels of 4, 2, 1 and 1/2 times the resolution of one map, and a max-pooled extra one (Li et
    al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, section 3).

    Of a map of stride 16 these are `p2` to `p6`. Two transposed convolutions make the largest,
    with a norm and GELU between them, one the next, and a max pooling the smallest; a 1x1 and a
    3x3 convolution with norms follow on each.
    """

    def __init__(self, *, bottom_up: Backbone, out_channels: int = 256, norm: str = "LN"):
        """
        Args:
            bottom_up: network with one feature map.
            out_channels: of every level.
            norm: of the convolutions, see `resolve_norm`.
        """
        super().__init__()
        self.bottom_up = bottom_up
        ((self.in_feature, shape),) = bottom_up.output_shape().items()
        self.levels, self._out_feature_strides = nn.ModuleDict(), {}
        for scale in (4, 2, 1, 0.5):
            layers, channels = _rescale(shape.channels, scale, norm)
            layers += [
                _convolution(channels, out_channels, 1, norm),
                _convolution(out_channels, out_channels, 3, norm),
            ]
            stride = int(shape.stride / scale)
            name = f"p{int(math.log2(stride))}"
            self.levels[name] = nn.Sequential(*layers)
            self._out_feature_strides[name] = stride
        self.top_block = LastLevelMaxPool()
        self._last = name
        extra = f"p{int(math.log2(stride)) + 1}"
        self._out_feature_strides[extra] = 2 * stride
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = stride

    @property
    def size_divisibility(self) -> int:
        """In pixels: images are padded to multiples of it."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """N x 3 x H x W, sides multiples of `size_divisibility` -> levels by name."""
        last = self.bottom_up(x)[self.in_feature]
        out = {name: level(last) for name, level in self.levels.items()}
        out[self._out_features[-1]] = self.top_block(out[self._last])[0]
        return out


def _rescale(channels: int, scale: float, norm: str) -> tuple[list[nn.Module], int]:
    """Layers that change the resolution by a factor, and the channels after them."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2),
            get_norm(resolve_norm(norm), channels // 2),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2),
        ], channels // 4
    if scale == 2:
        layer = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        return [layer], channels // 2
    return ([] if scale == 1 else [nn.MaxPool2d(kernel_size=2, stride=2)]), channels


def _convolution(inputs: int, outputs: int, size: int, norm: str) -> Conv2d:
    return Conv2d(
        inputs,
        outputs,
        kernel_size=size,
        padding=size // 2,
        bias=norm == "",
        norm=get_norm(resolve_norm(norm), outputs),
    )
