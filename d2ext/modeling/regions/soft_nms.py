"""Soft-NMS: instead of removing boxes that overlap a better one, lower their scores (Bodla et al.,
Improving Object Detection With One Line of Code, ICCV 2017)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2ext.errors import UserError
from d2ext.modeling.regions.batching import pairwise_ious

from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

METHODS = ("linear", "gaussian")


class SoftNMS(NamedTuple):
    """
    method: "linear" multiplies scores by 1 - IoU from `iou_threshold` on, as in the paper's
        equation 3 and in Swin's HTC++; "gaussian" by exp(-IoU^2 / sigma), its equation 4.
    iou_threshold: of the linear method.
    sigma: of the Gaussian.
    min_score: boxes are left out once their score is lower.
    """

    method: str
    iou_threshold: float = 0.5
    sigma: float = 0.5
    min_score: float = 1e-3

    def check(self) -> None:
        """Raise `UserError` for what is out of range."""
        if self.method not in METHODS:
            raise UserError(
                f"the method of Soft-NMS is '{self.method}'; it has to be one of {METHODS}"
            )
        if not self.sigma > 0:
            raise UserError(f"sigma of Soft-NMS is {self.sigma}; it has to be above 0")

    def __call__(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Apply it to each class by itself, to all of them at once.

        Args:
            boxes: N x 4 in pixels.
            scores: (N,).
            classes: (N,) int64.

        Returns:
            rows of the boxes that are left, by falling score, and their scores (M,) each.
        """
        if len(boxes) == 0:
            return classes.new_zeros(0), scores
        order = torch.argsort(classes, stable=True)
        _, counts = torch.unique_consecutive(classes[order], return_counts=True)
        number, longest = len(counts), int(counts.max())
        lane = torch.repeat_interleave(torch.arange(number, device=boxes.device), counts)
        place = torch.arange(len(order), device=boxes.device) - (counts.cumsum(0) - counts)[lane]
        # One row for each class, filled up with boxes that never count.
        rows = classes.new_full((number, longest), -1)
        rows[lane, place] = order
        padded = boxes[rows.clamp(min=0)]
        left = scores[rows.clamp(min=0)].masked_fill(rows < 0, -1)
        final = torch.full_like(left, -1)
        lanes = torch.arange(number, device=boxes.device)
        for _ in range(longest):
            best, index = left.max(dim=1)
            alive = best >= self.min_score
            if not alive.any():
                break
            final[lanes, index] = torch.where(alive, best, final[lanes, index])
            left[lanes, index] = -1
            iou = pairwise_ious(padded[lanes, index][:, None], padded)[:, 0]
            left = torch.where(alive[:, None] & (left > 0), left * self._factor(iou), left)
        kept = final.flatten() >= self.min_score
        rows, final = rows.flatten()[kept], final.flatten()[kept]
        final, order = final.sort(descending=True, stable=True)
        return rows[order], final

    def _factor(self, iou: Tensor) -> Tensor:
        if self.method == "gaussian":
            return torch.exp(-iou.square() / self.sigma)
        return torch.where(iou >= self.iou_threshold, 1 - iou, 1.0)


def make_soft_nms(
    method: str, iou_threshold: float, sigma: float, min_score: float
) -> SoftNMS | None:
    """The checked settings of region heads; None for method ""."""
    if not method:
        return None
    soft = SoftNMS(method, iou_threshold, sigma, min_score)
    soft.check()
    return soft


def soft_nms_from_config(cfg: CfgNode) -> dict[str, Any]:
    """The arguments `soft_nms...` of region heads from a yaml config."""
    soft = cfg.MODEL.SOFT_NMS
    return {
        "soft_nms": soft.METHOD,
        "soft_nms_sigma": soft.SIGMA,
        "soft_nms_min_score": soft.MIN_SCORE,
    }


def detect_softly(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    score_threshold: float,
    soft: SoftNMS,
    most: int,
) -> Instances:
    """Detections of one image; detectron2's `fast_rcnn_inference_single_image` with Soft-NMS.

    Args:
        boxes: R x 4, the same for all classes.
        scores: R x (K + 1), background last.
        image_size: height, width in pixels.
        score_threshold: scores at or below do not take part.
        most: number of detections at most; negative: all.

    Returns:
        `Instances` with `pred_boxes`, `scores` and `pred_classes`, the best first.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    boxes, scores = Boxes(boxes[finite]), scores[finite, :-1]
    boxes.clip(image_size)
    rows, classes = (scores > score_threshold).nonzero(as_tuple=True)
    kept, found = soft(boxes.tensor[rows], scores[rows, classes], classes)
    if most >= 0:
        kept, found = kept[:most], found[:most]
    return Instances(
        image_size,
        pred_boxes=boxes[rows[kept]],
        scores=found,
        pred_classes=classes[kept],
    )
