"""Deformable bottleneck block on torchvision's operator, which has forward and backward kernels for
CPU and CUDA; detectron2's own layer needs its compiled extension and cannot train on a CPU."""

import fvcore.nn.weight_init as weight_init
from torchvision.ops import deform_conv2d

from detectron2.layers import DeformConv, ModulatedDeformConv, get_norm
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock as _DeformBottleneckBlock


class _TorchvisionForward:
    """forward() of both deformable layers; the parameters are detectron2's."""

    def forward(self, x, offset, mask=None):
        """
        Args:
            x: N x C x H x W.
            offset: N x (2 * groups * 9) x H' x W', (dy, dx) per kernel tap, in pixels.
            mask: N x (groups * 9) x H' x W' modulation in [0, 1]; None without it.
        """
        x = deform_conv2d(
            x,
            offset,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class TorchvisionDeformConv(_TorchvisionForward, DeformConv):
    """Deformable convolution (Dai et al., ICCV 2017), grouped kernels allowed."""


class TorchvisionModulatedDeformConv(_TorchvisionForward, ModulatedDeformConv):
    """Modulated deformable convolution (Zhu et al., CVPR 2019)."""


class DeformBottleneckBlock(_DeformBottleneckBlock):
    """detectron2's block of the same name, same parameter names, with the torchvision operator."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm="BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ):
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
            deform_modulated=deform_modulated,
            deform_num_groups=deform_num_groups,
        )
        layer = TorchvisionModulatedDeformConv if deform_modulated else TorchvisionDeformConv
        self.conv2 = layer(
            bottleneck_channels,
            bottleneck_channels,
            kernel_size=3,
            stride=1 if stride_in_1x1 else stride,
            padding=dilation,
            bias=False,
            groups=num_groups,
            dilation=dilation,
            deformable_groups=deform_num_groups,
            norm=get_norm(norm, bottleneck_channels),
        )
        weight_init.c2_msra_fill(self.conv2)
