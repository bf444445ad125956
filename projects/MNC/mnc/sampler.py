"""Training boxes of a pass: labelled by their IoU with the ground truth and drawn from intervals of
it, with coordinates that are still part of the graph."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import (
    Candidates,
    Draw,
    pad,
    pad_targets,
    pairwise_ious,
    present,
)
from d2ext.modeling.regions.samples import Samples, gather_samples, split_samples
from d2ext.modeling.regions.sampling import image_generator, random_ranks
from d2ext.projects.mnc.box_transform import exact_boxes

from detectron2.structures import Instances


class MNCSampler:
    """Foreground up to a share of the batch, background from two intervals of IoU, no refill.

    A call returns one `Instances` per image, foreground first, with the fields

    * `proposal_boxes` (Boxes): the R chosen boxes, with gradient where the input has one;
    * `foreground` (bool): drawn because the IoU with some ground truth reaches `iou_threshold`; a
      box right at the threshold may be drawn once more from a background interval, as background;
    * `gt_classes` (int64): class of the matched ground truth, `num_classes` for background;
    * `gt_index` (int64): row of the ground truth with the highest IoU;
    * `gt_boxes` (Boxes): its box; zeros in images without ground truth;
    * `anchor_index` (int64): the anchor a proposal came from, -1 for ground truth; not from
      `label_all`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int = 64,
        positive_fraction: float = 0.3,
        iou_threshold: float = 0.5,
        background_intervals: Sequence[Sequence[float]] = ((0.1, 0.5), (0.0, 0.1)),
        background_fractions: Sequence[float] = (0.85, 0.15),
    ):
        """
        Args:
            num_classes: number of foreground classes, which is also the background label.
            batch_size_per_image: number of boxes to sample at most.
            positive_fraction: upper limit of the share of foreground.
            iou_threshold: IoU with some ground truth from which on a box is foreground.
            background_intervals: IoU intervals, closed on both sides.
            background_fractions: upper limit of each interval's share of what the foreground
                leaves. An interval that has too few boxes is not filled up from another one.
        """
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.iou_threshold = iou_threshold
        self.background_intervals = [tuple(interval) for interval in background_intervals]
        self.background_fractions = list(background_fractions)

    def __call__(
        self, proposals: Sequence[Instances], targets: Sequence[Instances], tag: str
    ) -> list[Samples]:
        """Sample from the proposals and the ground-truth boxes appended to them.

        Args:
            proposals: per image, with `proposal_boxes` and, optionally, `anchor_index`.
            targets: per image, with `gt_boxes` and `gt_classes`.
            tag: purpose of this round, see `image_generator`.
        """
        boxes = [p.proposal_boxes.tensor for p in proposals]
        anchors = [
            p.anchor_index
            if p.has("anchor_index")
            else torch.full((len(p),), -1, device=p.proposal_boxes.device)
            for p in proposals
        ]
        return self._sample(boxes, targets, self._intervals, self._draw, tag, anchors)

    def label_all(self, boxes: Sequence[Tensor], targets: Sequence[Instances]) -> list[Samples]:
        """Label boxes (tensors, R x 4 per image) and the ground truth; every one is kept."""

        def foreground_and_rest(overlap: Tensor) -> list[Tensor]:
            return [overlap >= self.iou_threshold, overlap < self.iou_threshold]

        def everything(counts: Sequence[int], _) -> Draw:
            return Draw.of(*map(np.arange, counts))

        return self._sample(boxes, targets, foreground_and_rest, everything)

    def choose(self, overlap: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Indices of the sampled boxes, foreground first.

        Args:
            overlap: (R,) highest IoU of each box with the ground truth.
        """
        candidates = Candidates(torch.stack(self._intervals(overlap))[None])
        return candidates.rows([self._draw(candidates.counts[0], generator)])

    def _intervals(self, overlap: Tensor) -> list[Tensor]:
        """Masks of the foreground and of each background interval."""
        background = [
            (overlap >= low) & (overlap <= high) for low, high in self.background_intervals
        ]
        return [overlap >= self.iou_threshold, *background]

    def _draw(self, counts: Sequence[int], generator: torch.Generator | None) -> Draw:
        """Draw from the foreground and from each interval; one box may be drawn from both.

        Args:
            counts: number of candidates of each.
        """
        size = self.batch_size_per_image
        # Python rounds halves to even, as the release does.
        ranks = [random_ranks(counts[0], round(size * self.positive_fraction), generator)]
        rest = size - len(ranks[0])
        for count, fraction in zip(counts[1:], self.background_fractions):
            ranks.append(random_ranks(count, round(rest * fraction), generator))
        return Draw.of(*ranks)

    def _sample(
        self,
        boxes: Sequence[Tensor],
        targets: Sequence[Instances],
        masks: Callable[[Tensor], list[Tensor]],
        draw: Callable[[Sequence[int], torch.Generator | None], Draw],
        tag: str = "",
        anchors: Sequence[Tensor] | None = None,
    ) -> list[Samples]:
        """Samples of all images.

        Args:
            boxes: per image, R x 4.
            masks: what to draw from, of the highest IoU of each box with the ground truth.
            draw: see `_draw`.
            anchors: per image, the anchor (R,) of each box.
        """
        gt = pad_targets(targets)
        counts, boxes = [len(b) for b in boxes], pad(boxes)
        exists = torch.cat([present(counts, boxes), gt.present], dim=1)
        boxes = torch.cat([boxes, gt.boxes.to(boxes.dtype)], dim=1)
        iou = pairwise_ious(gt.boxes, boxes.detach().float())
        overlap, index = iou.masked_fill(~gt.present[..., None], 0).max(dim=1)
        candidates = Candidates(torch.stack(masks(overlap), dim=1) & exists[:, None])
        drawn = [draw(c, tag and image_generator(i, tag)) for i, c in enumerate(candidates.counts)]
        rows = candidates.rows(drawn)
        fields = gather_samples(drawn, rows, boxes, index, gt, self.num_classes)
        fields["foreground"] = fields.pop("positive")
        if anchors is not None:
            own = torch.full_like(gt.classes, -1)
            fields["anchor_index"] = torch.cat([pad(anchors), own], dim=1).flatten()[rows]
        return split_samples(fields, drawn, targets, [0] * len(drawn), exact_boxes)
