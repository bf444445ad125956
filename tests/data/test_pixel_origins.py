"""Rows and columns of the image that a transformed label map shows."""

import numpy as np
import pytest

from d2ext.data import LargeScaleJitter
from d2ext.data.pixel_origins import trace

from detectron2.data import transforms as T

CHAINS = {
    "resize": [T.ResizeScale(0.2, 3.0, 60, 70)],
    "flips": [T.RandomFlip(), T.RandomFlip(horizontal=False, vertical=True)],
    "turns": [T.RandomRotation([0, 90, 180, 270, -90], sample_style="choice")],
    "crop": [T.RandomCrop("relative_range", (0.3, 0.3)), T.RandomBrightness(0.5, 1.5)],
    "pad": [T.FixedSizeCrop((90, 80), pad_value=7.0)],
    "jitter": [LargeScaleJitter((50, 64)), T.RandomFlip()],
}
CHAINS["all"] = [a for name in ("turns", "crop", "resize", "flips", "jitter") for a in CHAINS[name]]


@pytest.mark.parametrize("name", CHAINS)
def test_pixels_come_from_where_the_transforms_take_them(name):
    draw = np.random.default_rng(0)
    np.random.seed(0)
    padded = 0
    for _ in range(25):
        height, width = draw.integers(1 if name != "crop" else 4, 90, 2).tolist()
        image = draw.integers(1, 250, (height, width)).astype(np.uint8)
        transforms = T.AugmentationList(CHAINS[name])(T.AugInput(image[:, :, None].repeat(3, 2)))
        origins = trace(transforms, height, width)
        source = image.T if origins.exchanged else image
        found = source[origins.rows[:, None], origins.columns]
        shown = (origins.rows >= 0)[:, None] & (origins.columns >= 0)
        expected = transforms.apply_segmentation(image)
        assert expected.shape == found.shape and origins.everywhere() == shown.all()
        np.testing.assert_array_equal(found[shown], expected[shown])
        ones = transforms.apply_segmentation(np.ones_like(image))
        np.testing.assert_array_equal(shown, ones == 1)
        padded += not shown.all()
        box = np.array([width // 4, height // 4, width // 4 + 1 + width // 2, height])
        crop = image[box[1] : box[3], box[0] : box[2]]
        moved, (x, y) = origins.move(crop, box)
        alone = np.zeros_like(image)
        alone[box[1] : box[3], box[0] : box[2]] = crop
        alone = np.where(shown, transforms.apply_segmentation(alone), 0)
        placed = np.zeros_like(alone)
        placed[y : y + moved.shape[0], x : x + moved.shape[1]] = moved
        np.testing.assert_array_equal(placed, alone)
    assert (padded > 0) == (name in ("pad", "jitter", "all"))


class Shifting(T.HFlipTransform):
    def apply_segmentation(self, segmentation):
        return np.roll(segmentation, 1)


def test_transforms_that_do_anything_else_are_not_followed():
    for transform in (
        Shifting(9),
        T.RotationTransform(8, 9, 30),
        T.RotationTransform(8, 9, 90, expand=False),
        T.ExtentTransform((1, 1, 5, 5), (6, 7)),
        T.ResizeTransform(9, 8, 4, 4),  # of an image of another size
    ):
        flip = T.HFlipTransform(9)
        assert trace(T.TransformList([flip, transform]), 8, 9) is None
        assert trace(T.TransformList([flip]), 8, 9) is not None
