"""The yaml keys of Multi-task Network Cascades. "Paper" is the CVPR 2016 text, "release" the last
state of its authors' Python and Caffe code, "first release" that of June 2016."""

from detectron2.config import CfgNode as CN


def add_mnc_config(cfg: CN) -> None:
    """Add `MODEL.MNC` with the settings of the release, its known errors mended."""
    mnc = cfg.MODEL.MNC = CN()
    # Stages in training: 3, or 5 with two passes over the same layers (paper, section 5).
    mnc.NUM_STAGES = 5
    # Stages in prediction; a network trained with 3 can predict with 5.
    mnc.NUM_STAGES_TEST = 5
    # Side of the masks: 21 in both releases, 28 in the paper.
    mnc.MASK_SIZE = 21
    # Width of the hidden layer of the mask head, and of the four of the category head.
    mnc.MASK_FC_DIM = 256
    mnc.FC_DIM = 4096
    # "MNCCategoryHead" (fully connected, VGG-16) or "MNCRes5CategoryHead" (ResNet-C4).
    mnc.CATEGORY_HEAD = "MNCCategoryHead"
    # Stages 2 and 3 on the feature map of one backbone, or each on a backbone of its own.
    mnc.SHARED_FEATURES = True

    # Samples along each side of a box, and side of its features: 28 and 14 take the maximum of 2x2
    # samples; 14 and 14 with WARP_BIN_REDUCE "edge_max" is the operator of the first release.
    mnc.WARP_SIZE = 28
    mnc.POOL_SIZE = 14
    mnc.WARP_BIN_REDUCE = "point"
    # Round boxes to whole feature cells (both releases; the paper does not).
    mnc.WARP_QUANTIZE = True
    # Samples outside the map: "clamp_half" (releases) or "zeros" (paper).
    mnc.WARP_BORDER = "clamp_half"
    # Sample the centres of the bins on half-pixel grids, as ROIAlign does, instead of their upper
    # left corners (paper and releases).
    mnc.WARP_ALIGNED = False
    # The release predicts stages 4 and 5 from POOL_SIZE samples without maximum, a leftover.
    mnc.LEGACY_LATE_WARP_TEST = False

    # Anchors of sampled boxes train the RPN with the labels of the boxes (release).
    mnc.RPN_RELABEL_FROM_ROIS = True
    # Factor of the mask losses: 2 in the releases, 1 in the paper.
    mnc.MASK_LOSS_WEIGHT = 2.0

    # Gradients through box coordinates; False treats all boxes as constants ("detach").
    mnc.BOX_GRADIENT = True
    # Gradients from the category head into the masks.
    mnc.GATE_GRADIENT = True
    # Elementwise limit, per image, of the gradient that reaches box deltas through boxes; 0: none.
    mnc.BOX_GRAD_CLIP = 1 / 512
    # Decode what the network predicts with its standard deviations; the release forgets them in
    # training.
    mnc.BRIDGE_DENORMALIZE_IN_TRAIN = True
    # Refine a box by its best foreground class even where background wins.
    mnc.BRIDGE_FG_ONLY_TRAIN = True
    mnc.BRIDGE_FG_ONLY_TEST = False
    # Every decoded box grows by one pixel to the right and to the bottom, as in the release.
    mnc.LEGACY_PLUS_ONE = False

    # Threshold of masks: targets, labels, voting and output.
    mnc.BIN_THRESH = 0.4
    # Merge the masks of overlapping candidates (paper, section 6).
    mnc.VOTING = True
    # "mnc" is the release's GPU code, "crop" its CPU code.
    mnc.VOTING_MODE = "mnc"
    # "compat" draws the voted MASK_SIZE mask as the release's evaluation does; "direct" draws the
    # vote itself.
    mnc.OUTPUT_MASKS = "compat"
