"""The yaml keys of the building blocks in `d2ext.modeling` that several projects share."""

from detectron2.config import CfgNode as CN


def add_modeling_config(cfg: CN) -> None:
    """Add the shared model keys to a detectron2 config, with defaults that change nothing."""
    slim = cfg.MODEL.SLIM_RESNET = CN()
    # Channels of the 7x7 stem of build_slim_resnet_fpn_backbone.
    slim.STEM_CHANNELS = 16
    # Channels of res2, res3, ... of the slim net.
    slim.STAGE_CHANNELS = [32, 64, 128, 256]
    # Basic blocks in res2, res3, ...; 2 each is ResNet-18.
    slim.STAGE_BLOCKS = [2, 2, 2, 2]

    rpn = cfg.MODEL.CAFFE_RPN = CN()
    # A ground truth that no anchor overlaps makes all anchors without overlap positive, as in the
    # Caffe release.
    rpn.MATCH_ZERO_OVERLAP = True
    # Divide the box loss by the number of anchors sampled instead of the number wanted.
    rpn.NORMALIZE_BOX_BY_SAMPLED = False
    # MODEL.PROPOSAL_GENERATOR.MIN_SIZE counts pixels of the original image, not the network input;
    # for proposal networks that are told both sizes (MNC's).
    rpn.SCALE_MIN_SIZE = False
    # Limit the log-size deltas on both sides instead of not at all.
    rpn.CLAMP_DELTAS = False

    # Max pooling of CaffeResNet's stem without padding, its output size rounded up, as in Caffe.
    cfg.MODEL.CAFFE_RESNET = CN({"CEIL_POOL": True})

    soft = cfg.MODEL.SOFT_NMS = CN()
    # Cascades (HTC, ReproducibleCascadeROIHeads): "linear" (from ROI_HEADS.NMS_THRESH_TEST on) or
    # "gaussian" lowers the scores of boxes that overlap a better one, instead of removing them, as
    # HTC++ of the Swin paper; "": remove them.
    soft.METHOD = ""
    # Of the Gaussian.
    soft.SIGMA = 0.5
    # Boxes are left out once their score is lower.
    soft.MIN_SCORE = 0.001

    net = cfg.MODEL.TIMM = CN()
    # A network of timm under build_timm_backbone or build_timm_fpn_backbone.
    net.NAME = "convnext_tiny"
    # Its weights: "hub", a file, or "" for random ones; left out where MODEL.WEIGHTS names a file.
    net.PRETRAINED = ""
    # Of res2 ... res5; empty: all.
    net.OUT_FEATURES = []
    # Rate of stochastic depth in the last block.
    net.DROP_PATH = 0.0
    # Leading stages without training: 1 is the stem, 2 also res2.
    net.FREEZE_AT = 0
    # What batch norms become: "FrozenBN", or "" to leave them.
    net.NORM = "FrozenBN"
    # "LN": a layer norm on every feature map, as in the detectors of Swin and ConvNeXt.
    net.OUT_NORM = ""
    # 16 dilates the last stage of networks that can be.
    net.OUTPUT_STRIDE = 32
    # Blocks of attention over the whole last map, as HTC++ adds one to Swin.
    net.GLOBAL_BLOCKS = 0
    # Rows and columns of the table of positions of samvit; 0: the network's own, ViTDet's: 14.
    net.POSITIONS = 0
    # Compute features again in the backward pass, for less memory.
    net.CHECKPOINTING = False
