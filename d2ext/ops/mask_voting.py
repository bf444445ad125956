"""Mask voting: from scored masks of overlapping boxes to final instances.

Sources: Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network Cascades", section
6; Li et al., "Fully Convolutional Instance-aware Semantic Segmentation", section 2.3; the two
releases for thresholds and order.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from d2ext.ops.mask_ops import mask_vote


class VotedInstances(NamedTuple):
    """Results of `MaskVoting`; all inclusive pixel indices of the image.

    Attributes:
        boxes: (R, 4) int32, tight around the voted masks.
        masks: (R, M, M) averages inside `boxes`, to be thresholded after resizing.
        scores: (R,) class scores of the seeds.
        classes: (R,) int64 column of `scores`.
        seeds: (R,) int64 row of the box that started each result.
    """

    boxes: Tensor
    masks: Tensor
    scores: Tensor
    classes: Tensor
    seeds: Tensor


def inclusive_iou(first: Tensor, second: Tensor) -> Tensor:
    """(n, m) IoU of boxes with inclusive corners (width `x2 - x1 + 1`)."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    width, height = (high - low + 1).clamp(min=0).unbind(-1)
    inter = width * height
    area1 = (first[:, 2:] - first[:, :2] + 1).prod(1)
    area2 = (second[:, 2:] - second[:, :2] + 1).prod(1)
    return inter / (area1[:, None] + area2[None] - inter)


def vote_candidates(
    boxes: Tensor, scores: Tensor, seeds: Tensor, classes: Tensor, *, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Who votes for each seed, and with what weight.

    Args:
        boxes: (N, 4) inclusive corners.
        scores: (N, K) class scores.
        seeds, classes: (R,) int64, box row and score column of each seed.
        iou_threshold: boxes with at least this IoU with the seed vote.

    Returns:
        `cand_index`, `cand_offset`, `cand_weight` of `mask_vote`. Weights are the
        voters' scores of the seed's class divided by their sum, or equal shares if that sum is 0.
    """
    votes = inclusive_iou(boxes[seeds], boxes) >= iou_threshold
    weight = torch.where(votes, scores.float().T[classes], 0.0)
    total = weight.sum(1, keepdim=True)
    count = votes.sum(1, keepdim=True)
    weight = torch.where(total > 0, weight / total, 1.0 / count.clamp(min=1))
    offset = torch.cat([count.new_zeros(1), count.flatten().cumsum(0)])
    index = votes.nonzero()[:, 1]
    return index.int(), offset.int(), weight[votes]


class MaskVoting(nn.Module):
    """Per-class NMS over all boxes, then one voted mask per surviving box.

    Every box may seed several classes, and every box, suppressed or not, votes for the seeds it
    overlaps.

    Args:
        mode: "fcis", "mnc" or "crop", see `mask_vote`.
        nms_threshold: boxes above this IoU with a better one are no seeds.
        merge_threshold: boxes with at least this IoU with a seed vote for it.
        binary_threshold: threshold of the vote.
        max_per_image: seeds per class and results per image (ties may exceed it).
        score_threshold: seeds need at least this score.
    """

    def __init__(
        self,
        *,
        mode: str = "fcis",
        nms_threshold: float = 0.3,
        merge_threshold: float = 0.5,
        binary_threshold: float = 0.4,
        max_per_image: int = 100,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.nms_threshold = nms_threshold
        self.merge_threshold = merge_threshold
        self.binary_threshold = binary_threshold
        self.max_per_image = max_per_image
        self.score_threshold = score_threshold

    def choose_seeds(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Box rows and score columns of the seeds, class by class, best first."""
        exclusive = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        seeds, classes = [], []
        for column in range(scores.shape[1]):
            kept = nms(exclusive, scores[:, column], self.nms_threshold)[: self.max_per_image]
            seeds.append(kept)
            classes.append(torch.full_like(kept, column))
        if not seeds:
            empty = torch.zeros(0, dtype=torch.int64, device=boxes.device)
            return empty, empty
        seed, cls = torch.cat(seeds), torch.cat(classes)
        value = scores[seed, cls]
        floor = value.new_tensor(self.score_threshold)
        if len(value):
            best = value.topk(min(len(value), self.max_per_image)).values
            floor = torch.maximum(floor, best[-1])
        keep = value >= floor
        return seed[keep], cls[keep]

    @torch.no_grad()
    def forward(
        self, boxes: Tensor, masks: Tensor, scores: Tensor, image_size: tuple[int, int]
    ) -> VotedInstances:
        """
        Args:
            boxes: (N, 4) inclusive corners in pixels of the image, float32.
            masks: (N, M, M) or (N, 1, M, M) mask probabilities.
            scores: (N, K) scores of the foreground classes.
            image_size: height, width.
        """
        masks = masks.flatten(0, -3)
        scores = scores.float()
        boxes = boxes.float()
        seeds, classes = self.choose_seeds(boxes, scores)
        candidates = vote_candidates(
            boxes, scores, seeds, classes, iou_threshold=self.merge_threshold
        )
        voted, tight = mask_vote(
            masks, boxes, *candidates, image_size,
            binary_thresh=self.binary_threshold, mode=self.mode,
        )  # fmt: skip
        result = VotedInstances(tight, voted, scores[seeds, classes], classes, seeds)
        if self.mode == "fcis":  # its release drops results one pixel wide or high
            solid = (tight[:, 2] > tight[:, 0]) & (tight[:, 3] > tight[:, 1])
            result = VotedInstances(*(value[solid] for value in result))
        return result

    def extra_repr(self) -> str:
        names = (
            "mode", "nms_threshold", "merge_threshold", "binary_threshold", "max_per_image",
            "score_threshold",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
