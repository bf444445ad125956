"""Transformed boxes and masks, compared with detectron2's own functions."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.data import LargeScaleJitter
from d2ext.data.transformed import MaskTransforms, transform_boxes, transform_polygons

from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.structures.masks import polygons_to_bitmask

HEIGHT, WIDTH = 96, 128
KINDS = ["polygons", "rle", "mixed"]
CHAINS = {
    "resize": [T.ResizeShortestEdge((60, 200), 300, "range")],
    "flip": [T.RandomFlip(prob=1.0), T.RandomFlip(prob=1.0, horizontal=False, vertical=True)],
    "crop": [T.RandomCrop("relative", (0.7, 0.7))],
    "turn": [T.RandomRotation([90, 180, 270], sample_style="choice")],
    "jitter": [LargeScaleJitter((110, 150), 0.5, 2.0), T.RandomFlip()],
    "any angle": [T.RandomRotation([-40, 40])],
    "extent": [T.RandomExtent((0.8, 1.2), (0.2, 0.2))],
}


def polygon_objects(draw, count=6, reach=(WIDTH, HEIGHT)):
    """Smooth outlines with sides of 20 to 70 pixels, some in two parts."""
    objects = []
    for i in range(count):
        parts = []
        for _ in range(1 + i % 2):
            angle = np.sort(draw.uniform(0, 2 * np.pi, 24))
            radius = draw.uniform(10, 35, 2)
            centre = draw.uniform(0, 1, 2) * reach
            points = centre + np.stack([np.cos(angle), np.sin(angle)], 1) * radius
            parts.append(points.clip(0, reach).round(2).ravel().tolist())
        objects.append(parts)
    return objects


def annotations_of(objects, kind):
    annotations = []
    for i, one in enumerate(objects):
        x, y = np.concatenate(one).reshape(-1, 2).T
        box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
        encode = kind == "rle" or (kind == "mixed" and i % 2)
        mask = mask_util.merge(mask_util.frPyObjects(one, HEIGHT, WIDTH)) if encode else one
        annotations.append(
            {"bbox": [float(v) for v in box], "bbox_mode": BoxMode.XYWH_ABS, "segmentation": mask}
        )
    return annotations


class Unpadded:
    """Padding, which detectron2's main branch gives the label 255, belongs to no object."""

    def __init__(self, transforms):
        self.apply_box, self.apply_polygons = transforms.apply_box, transforms.apply_polygons
        self.apply_segmentation = lambda m: (transforms.apply_segmentation(m) == 1).astype(np.uint8)


def drawn(augmentations, seed):
    np.random.seed(seed)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    augmented = T.AugInput(image)
    transforms = T.AugmentationList(augmentations)(augmented)
    return transforms, augmented.image.shape[:2]


def bit_for_bit():
    """Except polygons that are cropped: detectron2 cuts them with shapely."""
    return [(n, kind) for n in CHAINS for kind in (["rle"] if n == "crop" else KINDS)]


@pytest.mark.parametrize("name, kind", bit_for_bit())
def test_masks_and_boxes_are_those_of_detectron2_bit_for_bit(name, kind):
    draw = np.random.default_rng(0)
    for seed in range(4):
        transforms, size = drawn(CHAINS[name], seed)
        annotations = annotations_of(polygon_objects(draw), kind)
        expected = [
            utils.transform_instance_annotations(copy.deepcopy(a), Unpadded(transforms), size)
            for a in annotations
        ]
        boxes = transform_boxes(annotations, transforms, size)
        np.testing.assert_array_equal(boxes, [e["bbox"] for e in expected])
        masks = MaskTransforms(transforms, (HEIGHT, WIDTH), size)(
            [a["segmentation"] for a in annotations]
        )
        for found, one in zip(masks.bitmaps().numpy(), expected):
            mask = one["segmentation"]
            mask = polygons_to_bitmask(mask, *size) if isinstance(mask, list) else mask
            np.testing.assert_array_equal(found, mask.astype(bool))


@pytest.mark.parametrize("name", ["resize", "flip", "crop", "turn", "jitter"])
def test_drawing_polygons_last_changes_little(name, monkeypatch):
    """Beside drawing them at the size of the image and transforming pixels: mean IoU >= 0.98."""
    monkeypatch.setattr(f"{__name__}.HEIGHT", 480)
    monkeypatch.setattr(f"{__name__}.WIDTH", 640)
    draw = np.random.default_rng(1)
    overlaps = []
    for seed in range(4):
        transforms, size = drawn(CHAINS[name], seed)
        objects = [
            [[5 * v for v in part] for part in one]
            for one in polygon_objects(draw, reach=(128, 96))
        ]
        moving = MaskTransforms(transforms, (HEIGHT, WIDTH), size)
        last, first = (
            moving([a["segmentation"] for a in annotations_of(objects, kind)]).bitmaps()
            for kind in ("polygons", "rle")
        )
        union = (last | first).flatten(1).sum(1)
        seen = union > 0
        overlaps += ((last & first).flatten(1).sum(1)[seen] / union[seen]).tolist()
    assert len(overlaps) > 15 and np.mean(overlaps) >= 0.98


class Warp(T.Transform):
    """Moves pixels but no points: turns the picture upside down."""

    def apply_image(self, image):
        return image[::-1]

    def apply_coords(self, coords):
        raise NotImplementedError


def test_transforms_that_cannot_move_points_move_drawn_masks():
    objects = polygon_objects(np.random.default_rng(2))
    moving = MaskTransforms(T.TransformList([Warp()]), (HEIGHT, WIDTH), (HEIGHT, WIDTH))
    expected = [polygons_to_bitmask(one, HEIGHT, WIDTH)[::-1] for one in objects]
    for kind in KINDS:
        found = moving([a["segmentation"] for a in annotations_of(objects, kind)])
        np.testing.assert_array_equal(found.bitmaps().numpy(), expected)
    with pytest.raises(NotImplementedError):
        transform_polygons(objects, moving.transforms)


def test_whole_numbers_are_not_cut_to_whole_numbers_again():
    transforms = T.TransformList([T.ResizeTransform(10, 10, 15, 15)])
    ((points,),) = transform_polygons([[[1, 1, 9, 1, 9, 9]]], transforms)
    np.testing.assert_array_equal(points, [1.5, 1.5, 13.5, 1.5, 13.5, 13.5])


def test_arrays_are_masks_too():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:30, 20:50] = True
    transforms, size = drawn([T.RandomFlip(prob=1.0)], 0)
    found = MaskTransforms(transforms, (HEIGHT, WIDTH), size)([mask])
    np.testing.assert_array_equal(found.bitmaps()[0].numpy(), mask[:, ::-1])


def test_boxes_of_several_modes_are_read_one_by_one():
    boxes = [
        {"bbox": [1.0, 2.0, 3.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS},
        {"bbox": np.array([1.0, 2.0, 3.0, 4.0]), "bbox_mode": BoxMode.XYXY_ABS},
    ]
    nothing = T.TransformList([])
    found = transform_boxes(boxes, nothing, (5, 50))
    np.testing.assert_array_equal(found, [[1, 2, 4, 5], [1, 2, 3, 4]])
    assert transform_boxes([], nothing, (5, 50)).shape == (0, 4)
