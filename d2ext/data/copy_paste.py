"""Simple copy-paste (Ghiasi et al., CVPR 2021): objects of one training image in another one.

Both images are augmented independently before. Objects are not blended into their new surroundings:
the paper finds no gain in that (both section 3).
"""

import numpy as np
import torch
from torch.nn.functional import pad

from d2ext.data.masks import areas, bitmaps
from d2ext.errors import UserError

from detectron2.config import configurable
from detectron2.structures import BitMasks, Boxes, Instances

_FIELDS = {"gt_boxes", "gt_classes", "gt_masks"}


class CopyPaste:
    """Paste a random choice of the objects of one mapped image into another one.

    What they cover is cut out of the masks of the other objects and painted over in the semantic
    map. Crowd regions, which a mapped image has as ignored pixels of its map only, are covered in
    the same way and never pasted.
    """

    @configurable
    def __init__(
        self,
        *,
        prob: float = 0.0,
        max_objects: int = 100,
        min_visible: float = 0.05,
        min_area: int = 0,
    ):
        """
        Args:
            prob: share of the images into which objects are pasted; 0 turns it off.
            max_objects: number of objects pasted into an image at most.
            min_visible: objects of which a smaller share of their pixels is left are left out.
            min_area: and so are those that are cut to fewer pixels.

        Raises:
            UserError: a number out of range.
        """
        for key, value in (("PROB", prob), ("MIN_VISIBLE", min_visible)):
            if not 0 <= value <= 1:
                raise UserError(f"INPUT.COPY_PASTE.{key} is {value}; it has to lie in 0..1")
        if max_objects < 1:
            raise UserError(f"INPUT.COPY_PASTE.MAX_OBJECTS is {max_objects}; at least 1 is needed")
        self.prob, self.max_objects = prob, max_objects
        self.min_visible, self.min_area = min_visible, min_area

    @classmethod
    def from_config(cls, cfg):
        paste = cfg.INPUT.COPY_PASTE
        return {
            "prob": paste.PROB,
            "max_objects": paste.MAX_OBJECTS,
            "min_visible": paste.MIN_VISIBLE,
            "min_area": cfg.INPUT.MIN_MASK_AREA,
        }

    def __call__(self, target: dict, source: dict, generator: np.random.Generator) -> dict:
        """Paste objects at the place where they are in their own image.

        Args:
            target: output of the mapper, not modified: `image`, `instances` and, optionally,
                `sem_seg`.
            source: the same of another image. Of another size, it is cut or padded to the right
                and below.
            generator: chooses the objects.

        Returns:
            a new dict. Its `gt_masks` are bitmaps, whatever they were, if anything was pasted.
            First come the objects of `target`, in their order. Boxes of objects that were cut are
            those of their masks, others stay.

        Raises:
            UserError: instances with other fields than boxes, classes and masks.
        """
        old, new = (self._objects(x) for x in (target, source))
        if not len(new):
            return target
        count = int(generator.integers(1, min(len(new), self.max_objects) + 1))
        chosen = np.sort(generator.choice(len(new), count, replace=False))
        size = old.image_size
        new = self._cut(new[torch.from_numpy(chosen)], size, None)
        covered = new.gt_masks.tensor.any(0)
        if not covered.any():
            return target
        out = {**target, "instances": _join(self._cut(old, size, covered), new)}
        for name in ("image", "sem_seg"):
            if name in target:
                out[name] = torch.where(covered, _fit(source[name], size), target[name])
        return out

    def _objects(self, sample: dict) -> Instances:
        instances = sample["instances"]
        others = set(instances.get_fields()) - _FIELDS
        if others:
            raise UserError(f"copy-paste cannot cut {min(others)} of objects; set its prob to 0")
        return instances

    def _cut(self, objects: Instances, size, covered: torch.Tensor | None) -> Instances:
        """The parts of objects inside an image of a size that are not covered."""
        masks = bitmaps(objects.gt_masks, objects.image_size)
        visible = _fit(masks, size)
        if covered is not None:
            visible = visible & ~covered
        before, after = (areas(x) for x in (masks, visible))
        least = (self.min_visible * before).clamp(min=max(self.min_area, 1))
        left = ((after == before) | (after >= least)) & (after > 0)
        cut = BitMasks(visible)
        boxes, changed = objects.gt_boxes.tensor.clone(), after != before
        boxes[changed] = cut[changed].get_bounding_boxes().tensor
        result = Instances(size)
        result.gt_boxes = Boxes(boxes[left])
        result.gt_classes = objects.gt_classes[left]
        result.gt_masks = cut[left]
        return result


def _fit(x: torch.Tensor, size) -> torch.Tensor:
    """Cut (..., H, W) or pad it with zeros to a height and width, to the right and below."""
    height, width = size
    return pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


def _join(first: Instances, second: Instances) -> Instances:
    joined = Instances(first.image_size)
    joined.gt_boxes = Boxes.cat([first.gt_boxes, second.gt_boxes])
    joined.gt_classes = torch.cat([first.gt_classes, second.gt_classes])
    joined.gt_masks = BitMasks.cat([first.gt_masks, second.gt_masks])
    return joined
