"""FCIS ResNet-101 with the constants of the released COCO model."""

import math

from d2ext.modeling import CaffeResNet, CaffeRPN, ClampedBox2BoxTransform, RoundedAnchorGenerator
from d2ext.ops import MaskVoting
from d2ext.projects.fcis import FCIS, FCISROIHeads, RegionSampler

from detectron2.config import LazyCall as L
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead

model = L(FCIS)(
    # Caffe weights: stride in the first 1x1, BGR; statistics fixed, scale and bias trained.
    backbone=L(CaffeResNet)(
        depth=101,
        norm="EvalStatsBN",
        freeze_at=2,
        stride_in_1x1=True,
        res5_dilation=2,
        ceil_pool=True,
        out_features=["res4", "res5"],
    ),
    proposal_generator=L(CaffeRPN)(
        in_features=["res4"],
        head=L(StandardRPNHead)(in_channels=1024, num_anchors=12, conv_dims=[512]),
        anchor_generator=L(RoundedAnchorGenerator)(
            sizes=[[64, 128, 256, 512]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[16],
            offset=0.5,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=False
        ),
        box2box_transform=L(ClampedBox2BoxTransform)(
            weights=[1.0, 1.0, 1.0, 1.0], scale_clamp=math.inf
        ),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(6000, 6000),
        post_nms_topk=(300, 300),
        nms_thresh=0.7,
        min_box_size=2,
        smooth_l1_beta=1 / 9,
        match_zero_overlap=True,
    ),
    roi_heads=L(FCISROIHeads)(
        num_classes=80,
        in_feature="res5",
        in_channels=2048,
        stride=16,
        conv_dim=1024,
        group_size=7,
        out_size=21,
        joint=True,
        # Hard example mining looks at all regions; without it (ohem=False) the sampler draws
        # batch_size_per_image of them.
        sampler=L(RegionSampler)(
            num_classes="${model.roi_heads.num_classes}",
            iou_threshold=0.5,
            batch_size_per_image=-1,
            positive_fraction=0.25,
            background_iou=0.0,
        ),
        ohem=True,
        batch_size_per_image=128,
        loss_weights=[1.0, 10.0, 1.0],
        box2box_transform=L(ClampedBox2BoxTransform)(
            weights=[5.0, 5.0, 2.0, 2.0], scale_clamp=math.inf
        ),
        refine=True,
        min_size_test=2,
        vote=True,
        voting=L(MaskVoting)(
            mode="fcis",
            nms_threshold=0.3,
            merge_threshold=0.5,
            binary_threshold=0.4,
            max_per_image=100,
            score_threshold=0.001,
        ),
    ),
    pixel_mean=[103.06, 115.90, 123.15],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
