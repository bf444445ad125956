"""What the transforms of an image make of the boxes and masks of its annotations.

Polygons and run-length encodings stay what they are until all transforms are known. Polygons are
then drawn once, at the final size, in the pixels that detectron2 draws. Of encoded masks, the
pixels inside their boxes are moved; each is the one to which `apply_segmentation` of all
transforms, one after the other, would have come. Where that cannot be known, as for a transform of
one's own or a rotation by any angle, the whole masks go that way.
"""

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch

from d2ext.data.cropped_masks import CroppedMasks, decode, draw_polygons, join
from d2ext.data.pixel_origins import trace

from detectron2.data import transforms as T
from detectron2.structures import BoxMode


def transform_boxes(
    annotations: Sequence[dict], transforms: T.TransformList, image_size: tuple[int, int]
) -> np.ndarray:
    """The annotated boxes, transformed and clipped to the image.

    Args:
        annotations: N annotations of a record.
        transforms: those of the image.
        image_size: its height and width after them.

    Returns:
        float64 (N, 4), x0, y0, x1, y1.
    """
    boxes = [a["bbox"] for a in annotations]
    modes = {a["bbox_mode"] for a in annotations}
    if not boxes:
        return np.zeros((0, 4))
    if len(modes) == 1 and all(isinstance(b, (list, tuple)) for b in boxes):
        # In single precision, in which detectron2 converts lists one by one.
        boxes = BoxMode.convert(torch.tensor(boxes), modes.pop(), BoxMode.XYXY_ABS).numpy()
    else:
        boxes = [
            BoxMode.convert(b, a["bbox_mode"], BoxMode.XYXY_ABS) for a, b in zip(annotations, boxes)
        ]
    boxes = transforms.apply_box(np.array(boxes, np.float64)).clip(min=0)
    return np.minimum(boxes, [*image_size, *image_size][::-1])


def transform_polygons(
    polygons: Sequence[Sequence[Sequence[float]]],
    transforms: T.TransformList,
    cut: bool = True,
) -> list[list[np.ndarray]]:
    """Polygons of objects, transformed.

    Args:
        polygons: for each object, its polygons as (x0, y0, x1, y1, ...) in pixels.
        transforms: those of the image.
        cut: whether crops cut polygons, with shapely, which fills their holes. Polygons that reach
            beyond the image are cut when they are drawn.

    Returns:
        the same as float64. A cut leaves out polygons outside of it, so an object may have none.

    Raises:
        NotImplementedError: by a transform that cannot move points.
    """
    objects = [[np.array(p, np.float64).reshape(-1, 2) for p in one] for one in polygons]
    for transform in transforms.transforms:
        method = type(transform).apply_polygons
        if method is T.Transform.apply_polygons or (
            method is T.CropTransform.apply_polygons and not cut
        ):
            objects = _move_points(transform, objects)
        else:
            objects = [transform.apply_polygons(one) for one in objects]
    return [[p.reshape(-1).astype(np.float64, copy=False) for p in one] for one in objects]


def _move_points(transform, objects):
    """All points of all objects at once."""
    parts = [p for one in objects for p in one]
    if not parts:
        return objects
    points = transform.apply_coords(np.concatenate(parts))
    ends = np.cumsum([len(p) for p in parts])
    moved = iter(np.split(points, ends[:-1]))
    return [[next(moved) for _ in one] for one in objects]


class MaskTransforms:
    """The transforms of one image, for masks."""

    def __init__(
        self, transforms: T.TransformList, old_size: tuple[int, int], new_size: tuple[int, int]
    ):
        """
        Args:
            transforms: of `detectron2.data.transforms`, or any others.
            old_size, new_size: height and width of the image before and after them.
        """
        self.transforms = transforms
        self.old_size, self.new_size = old_size, new_size
        self._origins = trace(transforms, *old_size)

    def __call__(
        self,
        segmentations: Sequence,
        polygons: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> CroppedMasks:
        """Masks at the final size.

        Args:
            segmentations: valid `segmentation` entries: polygons, RLE (compressed or not) or 2D
                arrays, in pixels of the untransformed image.
            polygons: where all are polygons, the result of `transform_polygons`, if it is known.

        Returns:
            one mask for each, in their order.
        """
        drawn = [i for i, s in enumerate(segmentations) if isinstance(s, list)]
        others = [i for i, s in enumerate(segmentations) if not isinstance(s, list)]
        if polygons is None and drawn:
            outlines = [segmentations[i] for i in drawn]
            try:
                polygons = transform_polygons(outlines, self.transforms, cut=False)
            except NotImplementedError:
                outlines = [[np.array(p, np.float64) for p in one] for one in outlines]
                moved = self._move(draw_polygons(outlines, *self.old_size))
        parts = []
        if drawn:
            parts.append(moved if polygons is None else draw_polygons(polygons, *self.new_size))
        if others:
            parts.append(self._move(_read([segmentations[i] for i in others], self.old_size)))
        if not parts:
            return CroppedMasks(self.new_size, np.zeros((0, 4), np.int64), [])
        return parts[0] if len(parts) == 1 else join(parts, drawn + others)

    def outside(self) -> np.ndarray | None:
        """Pixels that show no part of the image, as in padding: bool (H, W), or None if all do."""
        origins = self._origins
        if origins is not None:
            if origins.everywhere():
                return None
            return (origins.rows < 0)[:, None] | (origins.columns < 0)
        inside = self.transforms.apply_segmentation(np.ones(self.old_size, np.uint8)) == 1
        return None if inside.all() else ~inside

    def _move(self, masks):
        """Masks of the untransformed image in the transformed one."""
        if self._origins is not None:
            moved = [self._origins.move(c, b) for c, b in zip(masks.crops, masks.boxes)]
            return CroppedMasks.around(self.new_size, *zip(*moved))
        whole = []
        for i in range(len(masks)):
            bitmap = masks[[i]].bitmaps()[0].numpy().view(np.uint8)
            # Padding belongs to no object; detectron2's main branch gives it the ignored label of
            # semantic maps.
            bitmap = self.transforms.apply_segmentation(bitmap) == 1
            whole.append(np.ascontiguousarray(bitmap).view(np.uint8))
        return CroppedMasks.around(self.new_size, whole)


def _read(segmentations, size):
    """Run-length encodings and arrays as masks."""
    rles = [
        mask_util.encode(np.asfortranarray(s != 0, np.uint8)) if isinstance(s, np.ndarray) else s
        for s in segmentations
    ]
    return decode(rles, *size)
