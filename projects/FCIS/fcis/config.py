"""The yaml keys of FCIS; section of the paper, or the release, in the comments."""

from detectron2.config import CfgNode as CN


def add_fcis_config(cfg: CN) -> None:
    """Add `MODEL.FCIS` with the constants of the released COCO model."""
    fcis = cfg.MODEL.FCIS = CN()
    # Feature map that the score maps are computed from (section 2.3).
    fcis.IN_FEATURE = "res5"
    # Channels and kernel size of the convolution before the score maps.
    fcis.CONV_DIM = 1024
    fcis.CONV_KERNEL = 1
    # Parts per side of a region, k (section 2.1); 1 makes the network translation-invariant.
    fcis.GROUP_SIZE = 7
    # Cells per side of an assembled region, and of its mask.
    fcis.OUT_SIZE = 21
    # One set of score maps for detection and segmentation (section 2.2). Off: as many maps, but
    # half of them classify and the other half segment.
    fcis.JOINT = True
    # Train on the hardest regions of all (section 2.3) instead of on a random sample.
    fcis.OHEM = True
    # Least IoU of background in a random sample; fewer are only used to fill up.
    fcis.BACKGROUND_IOU = 0.0
    # Factors of the classification, mask and box losses; the paper has 1, 1, 1.
    fcis.LOSS_WEIGHTS = [1.0, 10.0, 1.0]
    # Limit the log-size deltas of the boxes on both sides instead of not at all.
    fcis.CLAMP_DELTAS = False
    # Corners are first and last pixels, rounded before the assembly, as in the release. Off:
    # continuous coordinates as elsewhere in detectron2; released weights do not fit then.
    fcis.INCLUSIVE = True

    # Inference: score the regions that the box branch has moved as well (section 2.3).
    fcis.REFINE = True
    # Regions with a side below so many pixels of the network input are dropped at test time.
    fcis.MIN_SIZE_TEST = 2
    # Merge the masks of overlapping regions (section 2.3, "mask voting").
    fcis.VOTE = True
    # Regions with at least this IoU vote for a detection.
    fcis.MERGE_IOU = 0.5
    # Threshold of voters, of the vote and of the final masks.
    fcis.BINARY_THRESH = 0.4
