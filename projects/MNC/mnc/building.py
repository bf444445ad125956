"""Parts of the region heads from a yaml config, as arguments for their constructors."""

from typing import Dict

from d2ext.errors import UserError
from d2ext.ops import RoIWarpPooler

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from .box_transform import MNCBoxTransform
from .heads import MNCCategoryHead, MNCMaskHead, MNCRes5CategoryHead
from .sampler import MNCSampler

__all__ = ["build_pooler", "category_feature", "roi_heads_from_config"]

_CATEGORY_HEADS = {
    "MNCCategoryHead": MNCCategoryHead,
    "MNCRes5CategoryHead": MNCRes5CategoryHead,
}


def category_feature(name: str) -> str:
    """The name under which an unshared feature map reaches the category head."""
    return f"category_{name}"


def build_pooler(
    warp_size: int,
    pool_size: int,
    scale: float,
    *,
    quantize: bool = True,
    aligned: bool = False,
    border: str = "clamp_half",
    bin_reduce: str = "point",
) -> RoIWarpPooler:
    """The RoI warp of the stages, with the maximum of 2x2 samples where the sizes ask for it.

    Args:
        warp_size (int): samples along each side of a box.
        pool_size (int): output along each side, ``warp_size`` or half of it.
        scale (float): feature cells per pixel.
        quantize (bool): round boxes to whole feature cells, as both releases do.
        aligned, border, bin_reduce: see :func:`d2ext.ops.roi_warp`.
    """
    if warp_size not in (pool_size, 2 * pool_size):
        raise UserError(
            f"MODEL.MNC.WARP_SIZE {warp_size} is neither POOL_SIZE {pool_size} nor twice of it."
        )
    return RoIWarpPooler(
        pool_size,
        [scale],
        max_pool=warp_size != pool_size,
        aligned=aligned,
        legacy=quantize,
        border=border,
        bin_reduce=bin_reduce,
    )


def roi_heads_from_config(cfg: CfgNode, input_shape: Dict[str, ShapeSpec]) -> dict:
    """Arguments of :class:`MNCROIHeads`."""
    own, names = cfg.MODEL.MNC, list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    if len(names) != 1:
        raise UserError(
            f"MNC warps from one feature map; MODEL.ROI_HEADS.IN_FEATURES names {names}."
        )
    if own.CATEGORY_HEAD not in _CATEGORY_HEADS:
        raise UserError(
            f"MODEL.MNC.CATEGORY_HEAD '{own.CATEGORY_HEAD}': known are {sorted(_CATEGORY_HEADS)}."
        )
    source = input_shape[names[0]]
    options = {
        "quantize": own.WARP_QUANTIZE,
        "aligned": own.WARP_ALIGNED,
        "border": own.WARP_BORDER,
        "bin_reduce": own.WARP_BIN_REDUCE,
    }
    shape = ShapeSpec(channels=source.channels, height=own.POOL_SIZE, width=own.POOL_SIZE)
    late = None
    if own.LEGACY_LATE_WARP_TEST:
        late = build_pooler(own.POOL_SIZE, own.POOL_SIZE, 1 / source.stride, **options)
    return {
        "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "in_features": names,
        "category_in_features": None
        if own.SHARED_FEATURES
        else [category_feature(name) for name in names],
        "pooler": build_pooler(own.WARP_SIZE, own.POOL_SIZE, 1 / source.stride, **options),
        "late_pooler_test": late,
        "mask_head": MNCMaskHead(cfg, shape),
        "category_head": _CATEGORY_HEADS[own.CATEGORY_HEAD](cfg, shape),
        "sampler": MNCSampler(
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            batch_size_per_image=cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
            positive_fraction=cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION,
            iou_threshold=cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0],
            background_intervals=own.BG_INTERVALS,
            background_fractions=own.BG_FRACTIONS,
        ),
        "box_transform": MNCBoxTransform(
            cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS, plus_one=own.LEGACY_PLUS_ONE
        ),
        "num_stages": own.NUM_STAGES,
        "num_stages_test": own.NUM_STAGES_TEST,
        "mask_loss_weight": own.MASK_LOSS_WEIGHT,
        "mask_threshold": own.BIN_THRESH,
        "mask_iou_threshold": own.MASK_IOU_THRESH,
        "box_gradient": own.BOX_GRADIENT,
        "gate_gradient": own.GATE_GRADIENT,
        "box_gradient_limit": own.BOX_GRAD_CLIP,
        "bridge_denormalize": own.BRIDGE_DENORMALIZE_IN_TRAIN,
        "bridge_foreground_only": (own.BRIDGE_FG_ONLY_TRAIN, own.BRIDGE_FG_ONLY_TEST),
    }
