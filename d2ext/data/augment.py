"""Augmentations of training images that detectron2 lacks, and the list of them that a yaml config
asks for. Lazy configs list them in `dataloader.train.mapper.augmentations`, like detectron2's.

Large-scale jitter is that of Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method
for Instance Segmentation", CVPR 2021, section 3.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as F

from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.data import transforms as T

# Of torchvision's ColorJitter.get_params, by the numbers in which it gives their order.
_ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class LargeScaleJitter(T.Augmentation):
    """Scale the image by a random factor, then crop it or pad it to one size.

    detectron2's `ResizeScale` and `FixedSizeCrop` do nearly the same; but these draw one position
    for both axes, and cut polygons with shapely, which fills their holes.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        min_scale: float = 0.1,
        max_scale: float = 2.0,
        pad_value: float = 128.0,
    ):
        """
        Args:
            size: height and width of the result in pixels; one number for a square.
            min_scale, max_scale: the image is scaled to fit into `size` times a number drawn
                uniformly from this range, its shape kept.
            pad_value: of pixels to the right and below that show no part of the image.

        Raises:
            UserError: a size or scale that is not positive, or an empty range.
        """
        super().__init__()
        sides = [size] if isinstance(size, int) else [int(side) for side in size]
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise UserError(
                f"the size of large-scale jitter (INPUT.LSJ.SIZE) is {sides}; give one or two "
                "numbers of at least 1"
            )
        if not 0 < min_scale <= max_scale:
            raise UserError(
                "the scales of large-scale jitter (INPUT.LSJ.MIN_SCALE, MAX_SCALE) are "
                f"{min_scale} and {max_scale}; they have to be above 0, the first the smaller one"
            )
        self.size = (sides[0], sides[-1])
        self.min_scale, self.max_scale = min_scale, max_scale
        self.pad_value = pad_value

    def get_transform(self, image):
        old = np.array(image.shape[:2])
        size = np.array(self.size)
        scale = np.random.uniform(self.min_scale, self.max_scale) * (size / old).min()
        new = np.maximum(np.round(old * scale), 1).astype(int)
        spare = np.maximum(new - size, 0)
        y, x = np.round(spare * np.random.uniform(size=2)).astype(int).tolist()
        bottom, right = np.maximum(size - new, 0).tolist()
        height, width = np.minimum(new, size).tolist()
        return T.TransformList(
            [
                T.ResizeTransform(*old.tolist(), *new.tolist()),
                _Window(x, y, width, height),
                T.PadTransform(0, 0, right, bottom, width, height, self.pad_value),
            ]
        )


class _Window(T.CropTransform):
    """A crop that leaves polygons whole: what turns them into bitmaps cuts them off, holes and
    self-intersections included, which their geometrical intersection would change."""

    apply_polygons = T.Transform.apply_polygons


class ColorJitter(T.Augmentation):
    """torchvision's `ColorJitter`: brightness, contrast, saturation and hue in random order."""

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        image_format: str = "BGR",
    ):
        """
        Args:
            brightness, contrast, saturation: factors are drawn from [max(0, 1 - x), 1 + x].
            hue: a shift in turns of the circle of hues is drawn from [-x, x]; at most 0.5.
            image_format: order of the channels, "BGR" or "RGB"; that of the mapper.

        Raises:
            UserError: a magnitude out of range, or an unknown format.
        """
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise UserError(f"colour jitter needs BGR or RGB images, not {image_format!r}")
        try:
            self._jitter = torchvision.transforms.ColorJitter(brightness, contrast, saturation, hue)
        except (ValueError, TypeError) as error:
            reason = str(error).rstrip(".")
            raise UserError(f"colour jitter (INPUT.COLOR_JITTER): {reason}") from error
        self.brightness, self.contrast = brightness, contrast
        self.saturation, self.hue = saturation, hue
        self.image_format = image_format

    def get_transform(self, image):
        jitter = self._jitter
        order, *values = jitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        steps = [(_ADJUST[i], values[i]) for i in order.tolist() if values[i] is not None]
        return T.ColorTransform(functools.partial(_adjust, steps, self.image_format == "BGR"))


def _adjust(steps, reverse, image):
    """`image` is uint8 (H, W, 3), its channels reversed if they are not in the order RGB."""
    channels = [2, 1, 0] if reverse else [0, 1, 2]
    pixels = torch.from_numpy(np.ascontiguousarray(image[:, :, channels].transpose(2, 0, 1)))
    for step, value in steps:
        pixels = step(pixels, value)
    return np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)[:, :, channels])


def add_augmentations(cfg: CfgNode, augmentations: Sequence) -> list:
    """What the keys of `d2ext.config.augmentation` add to detectron2's list for training.

    Args:
        cfg: a yaml config.
        augmentations: those of detectron2, with its resizing.

    Returns:
        a new list: cropping, rotation, resizing or large-scale jitter, flip, colours.
    """
    found = list(augmentations)
    place = [isinstance(a, T.ResizeShortestEdge) for a in found].index(True)
    jitter, color = cfg.INPUT.LSJ, cfg.INPUT.COLOR_JITTER
    if jitter.ENABLED:
        found[place] = LargeScaleJitter(jitter.SIZE, jitter.MIN_SCALE, jitter.MAX_SCALE)
    if cfg.INPUT.ROTATE_90:
        found.insert(place, T.RandomRotation([0, 90, 180, 270], sample_style="choice"))
    magnitudes = (color.BRIGHTNESS, color.CONTRAST, color.SATURATION, color.HUE)
    if any(magnitudes):
        found.append(ColorJitter(*magnitudes, image_format=cfg.INPUT.FORMAT))
    return found
