"""Test-time augmentation for FCIS: the regions of all scales and flips vote together, as for the
authors' entry to the COCO 2016 challenge (paper, section 4.2)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from d2ext.modeling.test_time_augmentation import is_mirrored, mirror_boxes
from d2ext.projects.fcis.postprocessing import scale_boxes, vote_instances

from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Instances


class FCISWithTTA(nn.Module):
    """FCIS on several sizes of each image and their mirror images; the interface of FCIS.

    In contrast to detectron2's `GeneralizedRCNNWithTTA`, which suppresses boxes first and
    averages masks of equal boxes then, all regions of all versions form one pool. Suppression,
    voting and thresholds are those of a single version.
    """

    def __init__(self, model: nn.Module, tta_mapper: Callable[[dict], list[dict]]):
        """
        Args:
            model: an `FCIS` in evaluation mode.
            tta_mapper: like detectron2's `DatasetMapperTTA`, makes a list of resized or mirrored
                inputs, each with the `transforms` that led to it.
        """
        super().__init__()
        self.model = model
        self.tta_mapper = tta_mapper

    @classmethod
    def from_sizes(
        cls, model: nn.Module, min_sizes: Sequence[int], max_size: int, flip: bool = True
    ) -> "FCISWithTTA":
        """Several short sides in pixels, each also mirrored if `flip`."""
        return cls(model, DatasetMapperTTA(min_sizes=list(min_sizes), max_size=max_size, flip=flip))

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: as for FCIS; `image` at any resolution up to the original one.
        """
        return [{"instances": self._image(x)} for x in batched_inputs]

    def _image(self, inputs: dict) -> Instances:
        size = tuple(inputs["image"].shape[1:])
        inputs = {"height": size[0], "width": size[1], **inputs}
        output_size = (inputs["height"], inputs["width"])
        boxes, probs, masks = [], [], []
        # One version at a time: their sizes differ, and large ones need the memory.
        for version in self.tta_mapper(inputs):
            pool = self.model.candidates([version])[0]
            corners, region_masks = pool.pixel_boxes, pool.pred_masks[:, 0]
            if is_mirrored(version["transforms"]):
                corners = mirror_boxes(corners, pool.image_size[1] - 1)
                region_masks = region_masks.flip(-1)
            boxes.append(scale_boxes(corners, pool.image_size, output_size))
            probs.append(pool.class_probs)
            masks.append(region_masks)
        return vote_instances(
            torch.cat(boxes),
            torch.cat(probs),
            torch.cat(masks),
            output_size,
            self.model.roi_heads.voting,
        )
