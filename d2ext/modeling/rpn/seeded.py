"""What the region proposal networks of both lineages share: anchors across the border of the image
never train, and which of the others do is reproducible for each image."""

import torch
from torch import Tensor

from d2ext.errors import UserError
from d2ext.modeling.regions.batching import Candidates, Draw, pad, pairwise_ious
from d2ext.modeling.regions.sampling import image_generator, share_ranks

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, Instances


class SeededRPN(RPN):
    """detectron2's RPN with two rules left to subclasses, `inside` and `match`.

    Anchors outside of the image are removed *before* matching, so that a ground truth at the border
    still finds its best anchor (detectron2 removes them afterwards or not at all). Sampling depends
    on the image only, see `d2ext.modeling.regions.sampling.image_generator`.
    """

    @configurable
    def __init__(self, *, anchor_boundary_thresh: float = -1.0, **kwargs):
        """
        Args:
            anchor_boundary_thresh: detectron2's limit, which has no meaning here.
            kwargs: arguments of detectron2's RPN; `anchor_matcher` without low-quality matches,
                which `match` decides about.
        """
        super().__init__(anchor_boundary_thresh=anchor_boundary_thresh, **kwargs)
        name = type(self).__name__
        if anchor_boundary_thresh >= 0:
            raise UserError(
                f"{name} has a rule of its own for anchors outside of the image: leave "
                "MODEL.RPN.BOUNDARY_THRESH at -1"
            )
        if self.anchor_matcher.allow_low_quality_matches:
            raise UserError(f"{name}: give anchor_matcher allow_low_quality_matches=False")

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        ret = super().from_config(cfg, input_shape)
        ret["anchor_matcher"] = Matcher(
            cfg.MODEL.RPN.IOU_THRESHOLDS,
            cfg.MODEL.RPN.IOU_LABELS,
            allow_low_quality_matches=False,
        )
        return ret

    def inside(self, anchors: Boxes, image_size: tuple[int, int]) -> Tensor:
        """(A,) bool, which anchors may train in an image of this height and width."""
        raise NotImplementedError

    def match(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Row of the matched ground truth (A,) and label (A,) in {-1, 0, 1} of each anchor.

        Args:
            iou: M ground truths x A anchors, M > 0; -1 for anchors outside of the image, of which
                it does not matter what is returned.
        """
        raise NotImplementedError

    def label_anchors(self, anchors: Boxes, gt: Instances) -> tuple[Tensor, Tensor]:
        """Labels (A,) of all anchors before sampling, and the row of their ground truth (A,)."""
        inside = self.inside(anchors, gt.image_size)
        if len(gt.gt_boxes) == 0:
            index = torch.zeros_like(inside, dtype=torch.int64)
            labels = torch.full_like(index, self.anchor_matcher.labels[0], dtype=torch.int8)
        else:
            iou = pairwise_ious(gt.gt_boxes.tensor, anchors.tensor)
            index, labels = self.match(iou.masked_fill(~inside, -1))
        return labels.masked_fill(~inside, -1), index

    def label_by_thresholds(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """What `anchor_matcher` gives for M > 0 ground truths x A anchors."""
        best, index = iou.max(dim=0)
        thresholds, values = self.anchor_matcher.thresholds[1:-1], self.anchor_matcher.labels
        labels = torch.full_like(index, values[0], dtype=torch.int8)
        for threshold, value in zip(thresholds, values[1:]):
            labels = labels.masked_fill(best >= threshold, value)
        return index, labels

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in the base class: per image, labels (A,) in {-1, 0, 1} and matched boxes (A x 4)."""
        anchors = Boxes.cat(anchors)
        # Image by image: the IoUs of all anchors with all objects of one are large enough.
        labels, index = zip(*(self.label_anchors(anchors, gt) for gt in gt_instances))
        labels = torch.stack(labels)
        candidates = Candidates(torch.stack([labels == 1, labels == 0], dim=1))
        share = self.batch_size_per_image, self.positive_fraction
        drawn = [
            Draw.of(*share_ranks(*counts, *share, image_generator(image, "rpn")))
            for image, counts in enumerate(candidates.counts)
        ]
        rows = candidates.rows(drawn)
        sampled = torch.full_like(labels, -1).flatten()
        sampled[rows] = labels.flatten()[rows]
        gt_boxes = pad([gt.gt_boxes.tensor for gt in gt_instances])
        matched = [boxes[rows] for boxes, rows in zip(gt_boxes, index)]
        return list(sampled.view_as(labels)), matched
