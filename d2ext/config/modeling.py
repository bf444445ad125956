"""The yaml keys of the building blocks in ``d2ext.modeling`` that several projects share."""

from detectron2.config import CfgNode as CN

__all__ = ["add_modeling_config"]


def add_modeling_config(cfg: CN) -> None:
    """Add the shared model keys to a detectron2 config, with defaults that change nothing."""
    slim = cfg.MODEL.SLIM_RESNET = CN()
    # Channels of the 7x7 stem of build_slim_resnet_fpn_backbone.
    slim.STEM_CHANNELS = 16
    # Channels of res2, res3, ... of the slim net.
    slim.STAGE_CHANNELS = [32, 64, 128, 256]
    # Basic blocks in res2, res3, ...; 2 each is ResNet-18.
    slim.STAGE_BLOCKS = [2, 2, 2, 2]

    rpn = cfg.MODEL.INSIDE_ANCHOR_RPN = CN()
    # Pixels by which training anchors of InsideAnchorRPN may exceed the image; negative: any.
    rpn.BOUNDARY_THRESH = 0.0
    # Remove those anchors before the matching (MMDetection) instead of after it (detectron2).
    rpn.FILTER_BEFORE_MATCHING = True
    # Least IoU from which a ground truth claims its best anchors; negative: detectron2's rule.
    rpn.LOW_QUALITY_IOU = 0.3
    # Divide the losses by the number of anchors sampled instead of the number wanted.
    rpn.NORMALIZE_BY_SAMPLED = True
    # Limit the log-size deltas on both sides instead of the upper one only.
    rpn.CLAMP_BOTH_SIDES = True

    rpn = cfg.MODEL.CAFFE_RPN = CN()
    # Pixels by which training anchors of CaffeRPN may exceed the image; negative: any.
    rpn.BOUNDARY_THRESH = 0.0
    # A ground truth that no anchor overlaps makes all anchors without overlap positive, as in the
    # Caffe release.
    rpn.MATCH_ZERO_OVERLAP = True
    # Divide the box loss by the number of anchors sampled instead of the number wanted.
    rpn.NORMALIZE_BOX_BY_SAMPLED = False
    # Propose from the floor(size / stride) first rows and columns of the feature map only.
    rpn.CROP_GRID = True
    # MODEL.PROPOSAL_GENERATOR.MIN_SIZE counts pixels of the original image, not the network input.
    rpn.SCALE_MIN_SIZE = False
    # Limit the log-size deltas on both sides instead of not at all.
    rpn.CLAMP_DELTAS = False

    # Max pooling of CaffeResNet's stem without padding, its output size rounded up, as in Caffe.
    cfg.MODEL.CAFFE_RESNET = CN({"CEIL_POOL": True})

    stages = cfg.MODEL.MULTI_STAGE = CN()
    # Factor of the losses of each stage of MultiStageROIHeads (Cascade R-CNN, MMDetection).
    stages.STAGE_LOSS_WEIGHTS = [1.0, 0.5, 0.25]
    # Sample anew in every stage, with ground truths appended, instead of in the first one only.
    stages.RESAMPLE = True
    # Give a positive box to a ground truth whose best box it is, even if another one fits better.
    stages.REASSIGN_LOW_QUALITY = False
    # Average class "logits" or "probs" over the stages at test time.
    stages.SCORE_AVERAGE = "logits"
    # Limit the log-size deltas on both sides instead of the upper one only.
    stages.CLAMP_BOTH_SIDES = True
    # Factor of the gradient into the pooled box features; detectron2's cascade uses 1/3.
    stages.FEATURE_GRADIENT_SCALE = 1.0
    # One mask head per stage instead of a single one trained on the samples of the first stage.
    stages.MASK_HEAD_PER_STAGE = True
