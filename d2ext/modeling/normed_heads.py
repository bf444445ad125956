"""detectron2's box and mask heads with the norms of d2ext's backbones, such as "LN" in ViTDet,
which v0.6 of detectron2 does not know by name."""

from d2ext.modeling.backbone.norm import resolve_norm

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
)


class _Normed:
    """The norm of the convolutions as d2ext's backbones have it, for a head of detectron2."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_norm: str = "", **kwargs):
        """
        Args:
            input_shape: of the features of a region.
            conv_norm: see `resolve_norm`.
            kwargs: arguments of detectron2's class.
        """
        super().__init__(input_shape, conv_norm=resolve_norm(conv_norm), **kwargs)


@ROI_BOX_HEAD_REGISTRY.register()
class NormedConvFCHead(_Normed, FastRCNNConvFCHead):
    """detectron2's head of convolutions and fully connected layers; see the module."""


@ROI_MASK_HEAD_REGISTRY.register()
class NormedMaskHead(_Normed, MaskRCNNConvUpsampleHead):
    """detectron2's mask head; see the module."""
