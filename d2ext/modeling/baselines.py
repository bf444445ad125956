"""detectron2's Mask R-CNN and Cascade with losses that do not depend on how a batch is spread.

detectron2 averages the losses of regions in each process, then over the processes, and draws
from one generator for all images. Published results come from there, so its own classes are
the default. These have the same parameters, predictions and, in one process, the same losses; over
several processes, or parts of a batch, every loss is a mean over all regions of the batch, and what
is drawn for an image depends on its `sample_seed`, which `ReproducibleRCNN` makes known.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from d2ext.modeling.regions.losses import divide_by_count
from d2ext.modeling.regions.sampling import image_generator

from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Instances


@contextlib.contextmanager
def _seeded(image: int, tag: str, device: torch.device) -> Iterator[None]:
    """Let torch's generators of the CPU and of a device draw by the seed of an image, if it has
    one; their states are restored at the end."""
    generator = image_generator(image, tag)
    if generator is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        yield


@PROPOSAL_GENERATOR_REGISTRY.register()
class ReproducibleRPN(RPN):
    """detectron2's RPN whose anchors are drawn by the seed of each image.

    Its losses are divided by numbers of images and anchors, which are the same in every process.
    """

    def label_and_sample_anchors(self, anchors, gt_instances: list[Instances]):
        self._numbers = itertools.count()  # detectron2 asks image by image
        return super().label_and_sample_anchors(anchors, gt_instances)

    def _subsample_labels(self, label: Tensor) -> Tensor:
        with _seeded(next(self._numbers), "rpn", label.device):
            return super()._subsample_labels(label)


class _ReproducibleSampling:
    """Region heads whose regions are drawn by the seed of each image, with losses of the masks
    that are means over all regions of the batch."""

    def label_and_sample_proposals(self, proposals, targets):
        self._numbers = itertools.count()
        return super().label_and_sample_proposals(proposals, targets)

    def _sample_proposals(self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor):
        with _seeded(next(self._numbers), "stage0_box", matched_idxs.device):
            return super()._sample_proposals(matched_idxs, matched_labels, gt_classes)

    def _forward_mask(self, features, instances):
        result = super()._forward_mask(features, instances)
        if not self.training or not self.mask_on:
            return result
        positive = sum((x.gt_classes < self.num_classes).sum() for x in instances)
        return _mean_over_batch(result, positive)


@ROI_HEADS_REGISTRY.register()
class ReproducibleROIHeads(_ReproducibleSampling, StandardROIHeads):
    """detectron2's `StandardROIHeads`, those of Mask R-CNN; see the module."""

    def _forward_box(self, features, proposals):
        result = super()._forward_box(features, proposals)
        if not self.training:
            return result
        return _mean_over_batch(result, sum(len(x) for x in proposals))


@ROI_HEADS_REGISTRY.register()
class ReproducibleCascadeROIHeads(_ReproducibleSampling, CascadeROIHeads):
    """detectron2's `CascadeROIHeads`; see the module."""

    def _forward_box(self, features, proposals, targets=None):
        self._regions: list[int] = []
        result = super()._forward_box(features, proposals, targets)
        if not self.training:
            return result
        losses = {}
        for stage, count in enumerate(self._regions):
            ending = f"_stage{stage}"
            own = {name: x for name, x in result.items() if name.endswith(ending)}
            losses |= _mean_over_batch(own, count)
        assert losses.keys() == result.keys()
        return losses

    def _run_stage(self, features, proposals, stage):
        self._regions.append(sum(len(x) for x in proposals))  # boxes without area are left out
        return super()._run_stage(features, proposals, stage)


def _mean_over_batch(losses: dict[str, Tensor], count: int | Tensor) -> dict[str, Tensor]:
    """Means over `count` regions of this process -> its share of the means over those of all."""
    some = next(iter(losses.values()))
    share = divide_by_count(torch.as_tensor(count, dtype=some.dtype, device=some.device), count)
    return {name: loss * share for name, loss in losses.items()}
