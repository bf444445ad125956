"""The mask head of one stage, which takes the features of the preceding stage's head (HTC paper,
section 3.1, "Mask Information Flow")."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
from torch import Tensor, nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    MaskRCNNConvUpsampleHead,
)


@ROI_MASK_HEAD_REGISTRY.register()
class HTCMaskHead(MaskRCNNConvUpsampleHead):
    """Mask R-CNN's head, split into trunk and output, with an optional inlet for another trunk.

    Parameters: `mask_fcn1` ..., `deconv`, `predictor` as in detectron2; `conv_res` (1x1)
    only if `information_flow`.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str = "",
        information_flow: bool = False,
        **kwargs,
    ):
        """
        Args:
            input_shape: channels and size of the region features.
            num_classes: number of mask channels; 1 for class-agnostic masks.
            conv_dims: output channels of the 3x3 convolutions and, last, of the deconvolution.
            conv_norm: norm of the 3x3 convolutions.
            information_flow: build the inlet for the features of the preceding head. These
                have the channels of this head's own features.
            kwargs: arguments of detectron2's mask heads.
        """
        conv_dims = list(conv_dims)
        super().__init__(
            input_shape, num_classes=num_classes, conv_dims=conv_dims, conv_norm=conv_norm, **kwargs
        )
        self.information_flow = information_flow
        if information_flow:
            features = conv_dims[-2] if len(conv_dims) > 1 else input_shape.channels
            self.conv_res = Conv2d(
                features, input_shape.channels, kernel_size=1, activation=nn.ReLU()
            )
            weight_init.c2_msra_fill(self.conv_res)

    def trunk(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """Features before the upsampling.

        Args:
            x: R x C x S x S region features.
            previous: R x D x S x S features of the preceding head on the *same* regions.

        Returns:
            R x D x S x S.
        """
        if previous is not None:
            x = x + self.conv_res(previous)
        for conv in self.conv_norm_relus:
            x = conv(x)
        return x

    def output(self, features: Tensor) -> Tensor:
        """Mask logits (R x K x 2S x 2S) of features from `trunk`."""
        return self.predictor(self.deconv_relu(self.deconv(features)))

    def layers(self, x: Tensor) -> Tensor:
        """Logits without the features of another head."""
        return self.output(self.trunk(x))
