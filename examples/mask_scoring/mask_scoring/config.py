"""The yaml keys of Mask Scoring R-CNN."""

from detectron2.config import CfgNode as CN


def add_mask_scoring_config(cfg: CN) -> None:
    """Add `MODEL.MASK_SCORING` with the settings of the paper (section 3.2)."""
    scoring = cfg.MODEL.MASK_SCORING = CN()
    # Channels of the four convolutions of the MaskIoU head.
    scoring.CONV_DIM = 256
    # Width of its first two fully connected layers.
    scoring.FC_DIM = 1024
    # Rank masks by the score of the box times the predicted IoU; else by the score of the box.
    scoring.RESCORE = True
