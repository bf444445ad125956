"""Hybrid Task Cascade R-50-FPN with the constants of MMDetection's released models."""

from d2ext.modeling import (
    ClampedBox2BoxTransform,
    InsideAnchorRPN,
    ProposalSampler,
    ResNetFPN,
    build_region_pooler,
)
from d2ext.projects.htc import FusedSemanticHead, HTCMaskHead, HTCROIHeads, HybridTaskCascade

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers

# Reciprocals of MMDetection's standard deviations; (30, 30, 15, 15) would not be equal.
_STAGE_WEIGHTS = [
    [1 / c, 1 / c, 1 / s, 1 / s] for c, s in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
]
_STAGE_IOUS = [0.5, 0.6, 0.7]

model = L(HybridTaskCascade)(
    # Stride in the 3x3 convolutions as in torchvision's weights; statistics fixed, scale and bias
    # trained.
    backbone=L(ResNetFPN)(
        depth=50, stride_in_1x1=False, norm="EvalStatsBN", freeze_at=2, out_channels=256
    ),
    proposal_generator=L(InsideAnchorRPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=False
        ),
        box2box_transform=L(ClampedBox2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(2000, 1000),
        nms_thresh=0.7,
        smooth_l1_beta=1 / 9,
    ),
    roi_heads=L(HTCROIHeads)(
        num_classes=80,
        samplers=[
            L(ProposalSampler)(
                num_classes="${model.roi_heads.num_classes}",
                iou_threshold=_iou,
                batch_size_per_image=512,
                positive_fraction=0.25,
                append_gt=True,
                reassign_low_quality=True,
            )
            for _iou in _STAGE_IOUS
        ],
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(build_region_pooler)(
            output_size=7,
            scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_heads=[
            L(FastRCNNConvFCHead)(
                input_shape=L(ShapeSpec)(channels=256, height=7, width=7),
                conv_dims=[],
                fc_dims=[1024, 1024],
            )
            for _ in _STAGE_IOUS
        ],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=L(ShapeSpec)(channels=1024),
                test_score_thresh=0.001,
                test_nms_thresh=0.5,
                test_topk_per_image=100,
                box2box_transform=L(ClampedBox2BoxTransform)(weights=_weights),
                cls_agnostic_bbox_reg=True,
                smooth_l1_beta=1.0,
                num_classes="${model.roi_heads.num_classes}",
            )
            for _weights in _STAGE_WEIGHTS
        ],
        mask_in_features=["p2", "p3", "p4", "p5"],
        mask_pooler=L(build_region_pooler)(
            output_size=14,
            scales=(1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32),
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        mask_head=[
            L(HTCMaskHead)(
                input_shape=L(ShapeSpec)(channels=256, width=14, height=14),
                num_classes="${model.roi_heads.num_classes}",
                conv_dims=[256, 256, 256, 256, 256],
                information_flow=_stage > 0,
            )
            for _stage in range(3)
        ],
        stage_loss_weights=[1.0, 0.5, 0.25],
        interleaved=True,
        mask_info_flow=True,
        mask_ensemble="mean",
        score_average="logits",
        soft_nms="",
        soft_nms_sigma=0.5,
        soft_nms_min_score=0.001,
        semantic_head=L(FusedSemanticHead)(
            in_channels=256,
            in_features=["p2", "p3", "p4", "p5", "p6"],
            reference_feature="p3",
            stride=8,
            num_classes=183,
            num_conv=4,
            conv_dim=256,
            loss_weight=0.2,
        ),
        semantic_pooler=L(build_region_pooler)(
            output_size=14, scales=(1.0 / 8,), sampling_ratio=0, pooler_type="ROIAlignV2"
        ),
        semantic_fusion=["box", "mask"],
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)
