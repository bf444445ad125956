"""A region proposal network that labels its anchors as MMDetection does."""

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou

from .box_refinement import ClampedBox2BoxTransform
from .losses import global_mean_count
from .sampling import best_matches, image_generator, subsample

__all__ = ["InsideAnchorRPN"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class InsideAnchorRPN(RPN):
    """detectron2's RPN with other rules for training labels; inference and weights are the same.

    * Anchors across the image border are removed *before* matching, so that a ground truth at the
      border still finds its best anchor (detectron2 removes them afterwards or not at all).
    * A ground truth claims its best anchors only from an IoU of ``low_quality_iou`` on, and then
      is their target (detectron2: any IoU, and the target stays the anchor's best ground truth).
    * The loss is divided by the number of anchors sampled (detectron2: by the number wanted).
    * Sampling is reproducible per image, see :func:`d2ext.modeling.sampling.image_generator`.
    """

    @configurable
    def __init__(
        self,
        *,
        low_quality_iou: Optional[float] = 0.3,
        filter_before_matching: bool = True,
        normalize_by_sampled: bool = True,
        anchor_boundary_thresh: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            low_quality_iou (float or None): see above; None leaves low-quality matches to
                ``anchor_matcher``, which otherwise must not do them.
            filter_before_matching (bool): apply ``anchor_boundary_thresh`` before the matching.
            normalize_by_sampled (bool): divide by the number of sampled anchors.
            anchor_boundary_thresh (float): pixels by which anchors may exceed the image in
                training; negative for no limit.
            kwargs: arguments of detectron2's RPN.
        """
        super().__init__(anchor_boundary_thresh=anchor_boundary_thresh, **kwargs)
        if low_quality_iou is not None and self.anchor_matcher.allow_low_quality_matches:
            raise ValueError(
                "InsideAnchorRPN: give anchor_matcher allow_low_quality_matches=False, "
                "or low_quality_iou=None."
            )
        self.low_quality_iou = low_quality_iou
        self.filter_before_matching = filter_before_matching
        self.normalize_by_sampled = normalize_by_sampled

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        rpn, own = cfg.MODEL.RPN, cfg.MODEL.INSIDE_ANCHOR_RPN
        ret = super().from_config(cfg, input_shape)
        low_quality = own.LOW_QUALITY_IOU >= 0
        ret["low_quality_iou"] = own.LOW_QUALITY_IOU if low_quality else None
        ret["anchor_matcher"] = Matcher(
            rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=not low_quality
        )
        ret["filter_before_matching"] = own.FILTER_BEFORE_MATCHING
        ret["normalize_by_sampled"] = own.NORMALIZE_BY_SAMPLED
        ret["anchor_boundary_thresh"] = own.BOUNDARY_THRESH
        if own.CLAMP_BOTH_SIDES:
            ret["box2box_transform"] = ClampedBox2BoxTransform(rpn.BBOX_REG_WEIGHTS)
        return ret

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """As in the base class: per image, labels (A,) in {-1, 0, 1} and matched boxes (A x 4)."""
        anchors = Boxes.cat(anchors)
        labels, matched = [], []
        for image, gt in enumerate(gt_instances):
            image_labels, index = self._match(anchors, gt)
            generator = image_generator(image, "rpn")
            positives, negatives = subsample(
                image_labels == 1,
                image_labels == 0,
                self.batch_size_per_image,
                self.positive_fraction,
                generator,
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

    def _match(self, anchors: Boxes, gt: Instances) -> Tuple[Tensor, Tensor]:
        """Labels (A,) of all anchors before sampling, and the row of their ground truth (A,)."""
        if self.anchor_boundary_thresh >= 0:
            inside = anchors.inside_box(gt.image_size, self.anchor_boundary_thresh)
        else:
            inside = torch.ones(len(anchors), dtype=torch.bool, device=anchors.device)
        if not self.filter_before_matching:
            labels, index = self._match_all(anchors, gt)
            labels[~inside] = -1
            return labels, index
        labels = torch.full((len(anchors),), -1, dtype=torch.int8, device=anchors.device)
        index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        labels[inside], index[inside] = self._match_all(anchors[inside], gt)
        return labels, index

    def _match_all(self, anchors: Boxes, gt: Instances) -> Tuple[Tensor, Tensor]:
        iou = pairwise_iou(gt.gt_boxes, anchors)
        index, labels = self.anchor_matcher(iou)
        if self.low_quality_iou is not None:
            claimed = best_matches(iou, self.low_quality_iou)
            index = torch.where(claimed >= 0, claimed, index)
            labels[claimed >= 0] = 1
        return labels, index

    def losses(
        self,
        anchors: List[Boxes],
        pred_objectness_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_anchor_deltas: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """As in the base class: ``loss_rpn_cls`` and ``loss_rpn_loc``."""
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        if not self.normalize_by_sampled:
            return losses
        sampled = sum((labels >= 0).sum() for labels in gt_labels)
        count = global_mean_count(sampled, gt_labels[0].device)
        wanted = self.batch_size_per_image * len(gt_labels)
        # Where nothing is sampled the losses are 0, whatever they are divided by.
        factor = torch.where(count > 0, wanted / count, torch.ones_like(count))
        return {name: loss * factor for name, loss in losses.items()}
