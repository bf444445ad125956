"""A cascade that yaml configs can name, for tests of the base class of multi-stage region heads."""

from d2ext.modeling import MultiStageROIHeads
from d2ext.modeling.cascade.from_config import cascade_from_config

from detectron2.config import configurable
from detectron2.modeling.roi_heads.mask_head import build_mask_head
from detectron2.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY


@ROI_HEADS_REGISTRY.register()
class PlainCascade(MultiStageROIHeads):
    """The base class with detectron2's mask heads, one per stage."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments, shape = cascade_from_config(cfg, input_shape)
        arguments["mask_head"] = [build_mask_head(cfg, shape) for _ in arguments["box_heads"]]
        return arguments
