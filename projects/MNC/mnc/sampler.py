"""Training boxes of a pass: labelled by their IoU with the ground truth and drawn from intervals of
it, with coordinates that are still part of the graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2ext.modeling.regions.sampling import image_generator, subsample
from mnc.box_transform import exact_boxes

from detectron2.structures import Boxes, Instances, pairwise_iou


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
    ) -> list[Instances]:
        """Sample from the proposals and the ground-truth boxes appended to them.

        Args:
            proposals: per image, with `proposal_boxes` and, optionally, `anchor_index`.
            targets: per image, with `gt_boxes` and `gt_classes`.
            tag: purpose of this round, see `image_generator`.
        """
        samples = []
        for image, (proposal, target) in enumerate(zip(proposals, targets)):
            boxes, overlap, index = self._match(proposal.proposal_boxes.tensor, target)
            rows = self._draw(overlap, image_generator(image, tag))
            sample = self._select(*rows, boxes, index, target)
            anchors = torch.full_like(index, -1)
            if proposal.has("anchor_index"):
                anchors[: len(proposal)] = proposal.anchor_index
            sample.anchor_index = anchors[torch.cat(rows)]
            samples.append(sample)
        return samples

    def label_all(self, boxes: Sequence[Tensor], targets: Sequence[Instances]) -> list[Instances]:
        """Label boxes (tensors, R x 4 per image) and the ground truth; every one is kept."""
        samples = []
        for image_boxes, target in zip(boxes, targets):
            candidates, overlap, index = self._match(image_boxes, target)
            foreground = overlap >= self.iou_threshold
            rows = foreground.nonzero()[:, 0], (~foreground).nonzero()[:, 0]
            samples.append(self._select(*rows, candidates, index, target))
        return samples

    def choose(self, overlap: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Indices of the sampled boxes, foreground first.

        Args:
            overlap: (R,) highest IoU of each box with the ground truth.
        """
        return torch.cat(self._draw(overlap, generator))

    def _draw(self, overlap: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Indices of foreground and background; one box may be among both."""

        def draw(candidates: Tensor, count: int) -> Tensor:
            none = torch.zeros_like(candidates)
            return subsample(candidates, none, count, 1.0, generator)[0]

        size = self.batch_size_per_image
        # Python rounds halves to even, as the release does.
        foreground = draw(overlap >= self.iou_threshold, round(size * self.positive_fraction))
        rest = size - len(foreground)
        background = [foreground[:0]]
        for (low, high), fraction in zip(self.background_intervals, self.background_fractions):
            background.append(draw((overlap >= low) & (overlap <= high), round(rest * fraction)))
        return foreground, torch.cat(background)

    @staticmethod
    def _match(boxes: Tensor, target: Instances) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes and ground truth together, their highest IoU, and the ground truth that has it."""
        gt_boxes = target.gt_boxes.tensor.to(boxes.dtype)
        boxes = torch.cat([boxes, gt_boxes])
        if len(gt_boxes) == 0:
            index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return boxes, boxes.detach().new_zeros(len(boxes)), index
        overlap, index = pairwise_iou(Boxes(gt_boxes), Boxes(boxes.detach())).max(dim=0)
        return boxes, overlap, index

    def _select(
        self,
        foreground: Tensor,
        background: Tensor,
        boxes: Tensor,
        index: Tensor,
        target: Instances,
    ) -> Instances:
        """The boxes of the rows `foreground`, then of `background`, labelled as such."""
        rows = torch.cat([foreground, background])
        result = Instances(target.image_size)
        result.proposal_boxes = exact_boxes(boxes[rows])
        result.gt_index = index = index[rows]
        is_foreground = torch.arange(len(rows), device=rows.device) < len(foreground)
        result.foreground = is_foreground
        no_class = torch.full_like(index, self.num_classes)
        if len(target.gt_boxes) == 0:
            result.gt_classes = no_class
            result.gt_boxes = exact_boxes(torch.zeros_like(boxes[rows]))
        else:
            result.gt_classes = torch.where(is_foreground, target.gt_classes[index], no_class)
            result.gt_boxes = exact_boxes(target.gt_boxes.tensor.to(boxes.dtype)[index])
        return result
