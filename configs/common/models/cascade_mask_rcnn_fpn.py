"""detectron2's Cascade Mask R-CNN R-50-FPN: three box heads, one mask head."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

from .mask_rcnn_fpn import model

model.proposal_generator.post_nms_topk = (2000, 1000)
_roi_heads = model.roi_heads
for _key in ("box_head", "box_predictor", "proposal_matcher"):
    del _roi_heads[_key]
_roi_heads._target_ = CascadeROIHeads
_roi_heads.box_heads = [
    L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=256, height=7, width=7),
        conv_dims=[],
        fc_dims=[1024, 1024],
    )
    for _ in range(3)
]
_roi_heads.box_predictors = [
    L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=1024),
        test_score_thresh=0.05,
        box2box_transform=L(Box2BoxTransform)(weights=_weights),
        cls_agnostic_bbox_reg=True,
        num_classes="${model.roi_heads.num_classes}",
    )
    for _weights in ([10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0])
]
_roi_heads.proposal_matchers = [
    L(Matcher)(thresholds=[_iou], labels=[0, 1], allow_low_quality_matches=False)
    for _iou in (0.5, 0.6, 0.7)
]
