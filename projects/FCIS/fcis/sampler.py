"""Which regions train FCIS, and their classes."""

import torch
from torch import Tensor

from d2ext.modeling.regions.sampling import ProposalSampler, subsample

from detectron2.structures import Instances, pairwise_iou


class RegionSampler(ProposalSampler):
    """All proposals and ground truths of an image, or a random sample of them.

    The output is that of `ProposalSampler`. To keep all of them is what hard example mining
    wants; a sample holds up to `positive_fraction` positives, then background that overlaps some
    object by `background_iou`. As in the release, a sample that is still too small is filled up
    with anything but the positives it holds, *labelled as background* (also positives that were not
    drawn), repeatedly if need be.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        iou_threshold: float = 0.5,
        batch_size_per_image: int = -1,
        positive_fraction: float = 0.25,
        background_iou: float = 0.0,
        append_gt: bool = True,
    ):
        """
        Args:
            num_classes, iou_threshold, positive_fraction, append_gt: see `ProposalSampler`.
            batch_size_per_image: size of the sample, -1 for all regions.
            background_iou: see the class.
        """
        super().__init__(
            num_classes=num_classes,
            iou_threshold=iou_threshold,
            batch_size_per_image=-1,
            positive_fraction=positive_fraction,
            append_gt=append_gt,
        )
        self.num_samples = batch_size_per_image
        self.background_iou = background_iou

    def _sample_image(
        self, boxes: Tensor, target: Instances, generator: torch.Generator | None
    ) -> Instances:
        regions = super()._sample_image(boxes, target, generator)
        if self.num_samples < 0:
            return regions
        positive = regions.gt_classes < self.num_classes
        background = ~positive & (self._best_iou(regions, target) >= self.background_iou)
        positives, negatives = subsample(
            positive, background, self.num_samples, self.positive_fraction, generator
        )
        others = torch.ones_like(positive).index_fill(0, positives, False).nonzero()[:, 0]
        missing = self.num_samples - len(positives) - len(negatives)
        while missing > 0 and len(others):
            drawn = torch.randperm(len(others), generator=generator)[:missing].to(others.device)
            negatives = torch.cat([negatives, others[drawn]])
            missing -= len(drawn)
        sample = regions[torch.cat([positives, negatives])]
        sample.gt_classes[len(positives) :] = self.num_classes
        return sample

    @staticmethod
    def _best_iou(regions: Instances, target: Instances) -> Tensor:
        if len(target) == 0:
            return torch.zeros(len(regions), device=regions.gt_classes.device)
        return pairwise_iou(target.gt_boxes, regions.proposal_boxes).max(dim=0).values
