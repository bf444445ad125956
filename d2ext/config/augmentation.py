"""The yaml keys of the augmentation of training images; all of it is off by default."""

from detectron2.config import CfgNode as CN


def add_augmentation_config(cfg: CN) -> None:
    """Add the keys to a detectron2 config, with defaults that change nothing."""
    jitter = cfg.INPUT.LSJ = CN()
    # Large-scale jitter in the place of the resizing to INPUT.MIN_SIZE_TRAIN.
    jitter.ENABLED = False
    # Height and width of every training image in pixels; one number for a square.
    jitter.SIZE = [1024]
    # Range of the factor between SIZE and the size to which the image is scaled.
    jitter.MIN_SCALE = 0.1
    jitter.MAX_SCALE = 2.0

    paste = cfg.INPUT.COPY_PASTE = CN()
    # Share of the training images that get objects of another one pasted into them.
    paste.PROB = 0.0
    # So many at most at once.
    paste.MAX_OBJECTS = 100
    # Objects of which a smaller share stays visible are left out.
    paste.MIN_VISIBLE = 0.05

    # Objects with fewer pixels after the augmentation are left out; 0: those without any.
    cfg.INPUT.MIN_MASK_AREA = 0
    # Turn training images by 0, 90, 180 or 270 degrees.
    cfg.INPUT.ROTATE_90 = False

    # Magnitudes of torchvision's ColorJitter: factors are drawn from 1 - x to 1 + x.
    color = cfg.INPUT.COLOR_JITTER = CN()
    color.BRIGHTNESS = 0.0
    color.CONTRAST = 0.0
    color.SATURATION = 0.0
    # Shift along the circle of hues, from -x to x turns, at most 0.5.
    color.HUE = 0.0
