"""The yaml keys of Hybrid Task Cascade; section and symbol of the paper in the comments."""

from detectron2.config import CfgNode as CN


def add_htc_config(cfg: CN) -> None:
    """Add `MODEL.HTC` with the settings of MMDetection's released models."""
    htc = cfg.MODEL.HTC = CN()
    # Train the mask branch of a stage on the boxes its box branch has refined (section 3.1).
    htc.INTERLEAVED = True
    # Feed the features of mask head t-1 into mask head t (section 3.1, G_t).
    htc.MASK_INFO_FLOW = True
    # Factor of the box and mask losses of each stage (section 3.3, alpha_t).
    htc.STAGE_LOSS_WEIGHTS = [1.0, 0.5, 0.25]
    # Give a positive box to a ground truth whose best box it is, even if another one fits better.
    htc.REASSIGN_LOW_QUALITY = True
    # Average class "logits" or "probs" over the stages at test time.
    htc.SCORE_AVERAGE = "logits"
    # Masks at test time: "mean" over the heads of all stages, or those of the "last" one.
    htc.MASK_ENSEMBLE = "mean"

    semantic = htc.SEMANTIC = CN()
    # Build the semantic segmentation branch and its loss (section 3.2).
    semantic.ENABLED = True
    # Branches whose region features get those of the semantic branch added: "box", "mask".
    semantic.FUSION = ["box", "mask"]
    # The number of labels is detectron2's MODEL.SEM_SEG_HEAD.NUM_CLASSES; it is set from the data.

    # Number and channels of the 3x3 convolutions after the fusion of the levels.
    semantic.NUM_CONV = 4
    semantic.CONV_DIM = 256
    # Factor of the semantic loss (section 3.3, beta); 1 in the text, 0.2 in the released models.
    semantic.LOSS_WEIGHT = 0.2
    # Divide the loss by all pixels, padded and ignored ones included (MMDetection since mid-2021).
    semantic.MEAN_OVER_ALL_PIXELS = False
