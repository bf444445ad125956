"""Which regions train FCIS, and their classes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import Draw
from d2ext.modeling.regions.sampling import ProposalSampler, share_ranks


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

    def _negatives(self, positive: Tensor, overlap: Tensor) -> list[Tensor]:
        """All, and those that overlap some object enough."""
        return [~positive, ~positive & (overlap.clamp(min=0) >= self.background_iou)]

    def _draw(self, counts: Sequence[int], generator: torch.Generator | None) -> Draw:
        if self.num_samples < 0:
            return super()._draw(counts, generator)
        num_positive, num_negative, num_background = counts[:3]
        positives, background = share_ranks(
            num_positive, num_background, self.num_samples, self.positive_fraction, generator
        )
        masks, ranks = np.repeat([0, 2], [len(positives), len(background)]), [positives, background]
        others = np.delete(np.arange(num_positive + num_negative), positives)
        missing = self.num_samples - len(masks)
        while missing > 0 and len(others):
            drawn = others[torch.randperm(len(others), generator=generator).numpy()[:missing]]
            masks = np.concatenate([masks, drawn >= num_positive])
            ranks.append(np.where(drawn < num_positive, drawn, drawn - num_positive))
            missing -= len(drawn)
        return Draw(masks, np.concatenate(ranks), len(positives))
