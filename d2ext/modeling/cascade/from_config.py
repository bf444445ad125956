"""Parts of multi-stage region heads from a yaml config, as arguments for their constructors."""

from torch import nn

from d2ext.errors import UserError
from d2ext.modeling.poolers import build_region_pooler
from d2ext.modeling.regions.refinement import ClampedBox2BoxTransform
from d2ext.modeling.regions.sampling import ProposalSampler
from d2ext.modeling.regions.soft_nms import soft_nms_from_config

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import build_box_head
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers


def cascade_from_config(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], *, reassign_low_quality: bool = False
) -> tuple[dict, ShapeSpec]:
    """Arguments of `MultiStageROIHeads` except its mask heads, and the shape of what these
    take: one stage for each entry of `MODEL.ROI_BOX_CASCADE_HEAD`.

    Args:
        reassign_low_quality: see `ProposalSampler`.
    """
    model, cascade = cfg.MODEL, cfg.MODEL.ROI_BOX_CASCADE_HEAD
    if not model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise UserError(
            "multi-stage region heads need MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
        )
    box_pooler, box_shape = _pooling(cfg, model.ROI_BOX_HEAD, input_shape)
    box_heads, box_predictors = [], []
    for weights in cascade.BBOX_REG_WEIGHTS:
        head = build_box_head(cfg, box_shape)
        transform = ClampedBox2BoxTransform(weights)
        box_heads.append(head)
        box_predictors.append(
            FastRCNNOutputLayers(cfg, head.output_shape, box2box_transform=transform)
        )
    samplers = [
        ProposalSampler(
            num_classes=model.ROI_HEADS.NUM_CLASSES,
            iou_threshold=iou,
            batch_size_per_image=model.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
            positive_fraction=model.ROI_HEADS.POSITIVE_FRACTION,
            append_gt=model.ROI_HEADS.PROPOSAL_APPEND_GT,
            reassign_low_quality=reassign_low_quality,
        )
        for iou in cascade.IOUS
    ]
    mask_pooler, mask_shape = _pooling(cfg, model.ROI_MASK_HEAD, input_shape)
    arguments = {
        "num_classes": model.ROI_HEADS.NUM_CLASSES,
        "box_in_features": model.ROI_HEADS.IN_FEATURES,
        "box_pooler": box_pooler,
        "box_heads": box_heads,
        "box_predictors": box_predictors,
        "samplers": samplers,
        "mask_in_features": model.ROI_HEADS.IN_FEATURES,
        "mask_pooler": mask_pooler,
        **soft_nms_from_config(cfg),
    }
    return arguments, mask_shape


def _pooling(
    cfg: CfgNode, branch: CfgNode, input_shape: dict[str, ShapeSpec]
) -> tuple[nn.Module, ShapeSpec]:
    """The pooler of a branch and the shape of what it returns for one region."""
    names, size = cfg.MODEL.ROI_HEADS.IN_FEATURES, branch.POOLER_RESOLUTION
    pooler = build_region_pooler(
        output_size=size,
        scales=tuple(1.0 / input_shape[name].stride for name in names),
        sampling_ratio=branch.POOLER_SAMPLING_RATIO,
        pooler_type=branch.POOLER_TYPE,
    )
    return pooler, ShapeSpec(channels=input_shape[names[0]].channels, width=size, height=size)
