"""What the region proposal networks of both lineages share: anchors across the border of the image
never train, and which of the others do is reproducible for each image."""

import torch
from torch import Tensor

from d2ext.errors import UserError
from d2ext.modeling.regions.sampling import image_generator, subsample

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou


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
            iou: M ground truths x A anchors inside the image.
        """
        raise NotImplementedError

    def label_anchors(self, anchors: Boxes, gt: Instances) -> tuple[Tensor, Tensor]:
        """Labels (A,) of all anchors before sampling, and the row of their ground truth (A,)."""
        inside = self.inside(anchors, gt.image_size)
        labels = torch.full((len(anchors),), -1, dtype=torch.int8, device=anchors.device)
        index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        index[inside], labels[inside] = self.match(pairwise_iou(gt.gt_boxes, anchors[inside]))
        return labels, index

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in the base class: per image, labels (A,) in {-1, 0, 1} and matched boxes (A x 4)."""
        anchors = Boxes.cat(anchors)
        labels, matched = [], []
        for image, gt in enumerate(gt_instances):
            image_labels, index = self.label_anchors(anchors, gt)
            positives, negatives = subsample(
                image_labels == 1,
                image_labels == 0,
                self.batch_size_per_image,
                self.positive_fraction,
                image_generator(image, "rpn"),
            )
            image_labels = torch.full_like(image_labels, -1)
            image_labels[positives] = 1
            image_labels[negatives] = 0
            labels.append(image_labels)
            if len(gt) == 0:
                matched.append(torch.zeros_like(anchors.tensor))
            else:
                matched.append(gt.gt_boxes.tensor[index])
        return labels, matched
