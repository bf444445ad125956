"""Multi-task Network Cascades as released: VGG-16, 20 classes, five stages."""

from d2ext.modeling import VGG16, RoundedAnchorGenerator
from d2ext.projects.mnc import (
    DifferentiableRPN,
    InstanceVoting,
    MNCBoxTransform,
    MNCCategoryHead,
    MNCMaskHead,
    MNCROIHeads,
    MNCSampler,
    MultitaskNetworkCascade,
    build_pooler,
)

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead

_BOX_SHAPE = L(ShapeSpec)(channels=512, height=14, width=14)

model = L(MultitaskNetworkCascade)(
    backbone=L(VGG16)(freeze_at=2),
    proposal_generator=L(DifferentiableRPN)(
        in_features=["conv5_3"],
        head=L(StandardRPNHead)(in_channels=512, num_anchors=9),
        anchor_generator=L(RoundedAnchorGenerator)(
            sizes=[[128, 256, 512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[16],
            offset=0.5,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=False
        ),
        box2box_transform=L(MNCBoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(12000, 6000),
        post_nms_topk=(300, 300),
        nms_thresh=0.7,
        min_box_size=16,
        scale_min_size=True,
        smooth_l1_beta=1 / 9,
        relabel_from_rois=True,
        box_gradient_limit=1 / 512,
    ),
    roi_heads=L(MNCROIHeads)(
        num_classes=20,
        in_features=["conv5_3"],
        pooler=L(build_pooler)(
            warp_size=28,
            pool_size=14,
            scale=1 / 16,
            quantize=True,
            aligned=False,
            border="clamp_half",
            bin_reduce="point",
        ),
        mask_head=L(MNCMaskHead)(input_shape=_BOX_SHAPE, fc_dim=256, mask_size=21),
        category_head=L(MNCCategoryHead)(
            input_shape=_BOX_SHAPE,
            num_classes="${model.roi_heads.num_classes}",
            fc_dim=4096,
        ),
        sampler=L(MNCSampler)(
            num_classes="${model.roi_heads.num_classes}",
            batch_size_per_image=64,
            positive_fraction=0.3,
            iou_threshold=0.5,
            background_intervals=[[0.1, 0.5], [0.0, 0.1]],
            background_fractions=[0.85, 0.15],
        ),
        box_transform=L(MNCBoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
        num_stages=5,
        num_stages_test=5,
        mask_loss_weight=2.0,
        mask_threshold=0.4,
        mask_iou_threshold=0.5,
        box_gradient=True,
        gate_gradient=True,
        box_gradient_limit="${model.proposal_generator.box_gradient_limit}",
        bridge_denormalize=True,
        bridge_foreground_only=[True, False],
    ),
    voting=L(InstanceVoting)(
        voting=True,
        mode="mnc",
        masks="compat",
        nms_threshold=0.3,
        merge_threshold=0.5,
        mask_threshold="${model.roi_heads.mask_threshold}",
        max_per_image=100,
    ),
    pixel_mean=[102.9801, 115.9465, 122.7717],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
