"""Parts of multi-stage region heads from a yaml config, as arguments for their constructors."""

from typing import Dict, List, Tuple

from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.box_head import build_box_head
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

from ..box_refinement import ClampedBox2BoxTransform
from ..sampling import ProposalSampler

__all__ = ["box_branch_from_config", "mask_pooling_from_config", "samplers_from_config"]


def _pooling(
    cfg: CfgNode, branch: CfgNode, input_shape: Dict[str, ShapeSpec]
) -> Tuple[ROIPooler, ShapeSpec]:
    """The pooler of a branch and the shape of what it returns for one region."""
    names, size = cfg.MODEL.ROI_HEADS.IN_FEATURES, branch.POOLER_RESOLUTION
    pooler = ROIPooler(
        output_size=size,
        scales=tuple(1.0 / input_shape[name].stride for name in names),
        sampling_ratio=branch.POOLER_SAMPLING_RATIO,
        pooler_type=branch.POOLER_TYPE,
    )
    return pooler, ShapeSpec(channels=input_shape[names[0]].channels, width=size, height=size)


def box_branch_from_config(
    cfg: CfgNode, input_shape: Dict[str, ShapeSpec], clamp_both_sides: bool
) -> dict:
    """Arguments of the box branch: one head and predictor for each entry of
    ``MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS``.

    Args:
        clamp_both_sides (bool): whether the decoders limit shrinking, too.
    """
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise UserError(
            "Multi-stage region heads need MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True."
        )
    pooler, shape = _pooling(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
    transform = ClampedBox2BoxTransform if clamp_both_sides else Box2BoxTransform
    heads, predictors = [], []
    for weights in cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS:
        head = build_box_head(cfg, shape)
        decoder = transform(weights=tuple(weights))
        heads.append(head)
        predictors.append(FastRCNNOutputLayers(cfg, head.output_shape, box2box_transform=decoder))
    return {
        "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
        "box_pooler": pooler,
        "box_heads": heads,
        "box_predictors": predictors,
    }


def mask_pooling_from_config(
    cfg: CfgNode, input_shape: Dict[str, ShapeSpec]
) -> Tuple[dict, ShapeSpec]:
    """Arguments of the mask branch except its heads, and the shape of their input."""
    pooler, shape = _pooling(cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape)
    return {"mask_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES, "mask_pooler": pooler}, shape


def samplers_from_config(
    cfg: CfgNode, resample: bool, reassign_low_quality: bool
) -> List[ProposalSampler]:
    """One sampler for each threshold of ``MODEL.ROI_BOX_CASCADE_HEAD.IOUS``.

    Args:
        resample (bool): False makes all but the first keep every box and append no ground truth.
        reassign_low_quality (bool): see :class:`ProposalSampler`.
    """
    heads = cfg.MODEL.ROI_HEADS
    return [
        ProposalSampler(
            num_classes=heads.NUM_CLASSES,
            iou_threshold=iou,
            batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE if resample or stage == 0 else -1,
            positive_fraction=heads.POSITIVE_FRACTION,
            append_gt=heads.PROPOSAL_APPEND_GT and (resample or stage == 0),
            reassign_low_quality=reassign_low_quality,
        )
        for stage, iou in enumerate(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    ]
