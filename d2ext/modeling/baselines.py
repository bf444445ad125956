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
from d2ext.modeling.regions.soft_nms import detect_softly, make_soft_nms, soft_nms_from_config

from detectron2.config import configurable
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
    """detectron2's `CascadeROIHeads`; see the module. Soft-NMS is an option."""

    takes_soft_nms = True

    @configurable
    def __init__(
        self,
        *,
        soft_nms: str = "",
        soft_nms_sigma: float = 0.5,
        soft_nms_min_score: float = 1e-3,
        **kwargs,
    ):
        """
        Args:
            soft_nms, soft_nms_sigma, soft_nms_min_score: see `MultiStageROIHeads`.
            kwargs: arguments of detectron2's class.
        """
        super().__init__(**kwargs)
        threshold = self.box_predictor[-1].test_nms_thresh
        self.soft_nms = make_soft_nms(soft_nms, threshold, soft_nms_sigma, soft_nms_min_score)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), **soft_nms_from_config(cfg)}

    def _detect_softly(self, features, proposals: list[Instances]) -> list[Instances]:
        """detectron2's inference of the box branch, with Soft-NMS at its end."""
        features = [features[name] for name in self.box_in_features]
        sizes = [x.image_size for x in proposals]
        boxes: list[Tensor] = []
        scores: list[list[Tensor]] = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage:
                proposals = self._create_proposals_from_boxes(boxes, sizes)
            predictions = super()._run_stage(features, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            scores.append(predictor.predict_probs(predictions, proposals))
        means = [sum(x) * (1.0 / len(x)) for x in zip(*scores)]
        threshold, most = predictor.test_score_thresh, predictor.test_topk_per_image
        return [
            detect_softly(box, mean, size, threshold, self.soft_nms, most)
            for box, mean, size in zip(boxes, means, sizes)
        ]

    def _forward_box(self, features, proposals, targets=None):
        if self.soft_nms and not self.training:
            return self._detect_softly(features, proposals)
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
