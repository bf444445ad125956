"""A region proposal network that labels its anchors as MMDetection does."""

import torch
from torch import Tensor

from d2ext.modeling.regions.losses import global_mean_count
from d2ext.modeling.regions.refinement import ClampedBox2BoxTransform
from d2ext.modeling.regions.sampling import best_matches
from d2ext.modeling.rpn.seeded import SeededRPN

from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes

# From this IoU on a ground truth claims its best anchors; MMDetection's `min_pos_iou`.
_LOW_QUALITY_IOU = 0.3


@PROPOSAL_GENERATOR_REGISTRY.register()
class InsideAnchorRPN(SeededRPN):
    """detectron2's RPN with other rules for training labels; inference and weights are the same.

    * Anchors across the image border are removed before matching, see `SeededRPN`.
    * A ground truth claims its best anchors only from an IoU of 0.3 on, and then is their target
      (detectron2: any IoU, and the target stays the anchor's best ground truth).
    * The loss is divided by the number of anchors sampled (detectron2: by the number wanted).
    """

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        ret = super().from_config(cfg, input_shape)
        ret["box2box_transform"] = ClampedBox2BoxTransform(cfg.MODEL.RPN.BBOX_REG_WEIGHTS)
        return ret

    def inside(self, anchors: Boxes, image_size: tuple[int, int]) -> Tensor:
        """Those that end before the right and lower border."""
        return anchors.inside_box(image_size)

    def match(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """By the matcher's thresholds, and as the ground truths claim."""
        index, labels = self.anchor_matcher(iou)
        claimed = best_matches(iou, _LOW_QUALITY_IOU)
        labels[claimed >= 0] = 1
        return torch.where(claimed >= 0, claimed, index), labels

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """As in the base class: `loss_rpn_cls` and `loss_rpn_loc`."""
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        sampled = sum((labels >= 0).sum() for labels in gt_labels)
        count = global_mean_count(sampled, gt_labels[0].device)
        wanted = self.batch_size_per_image * len(gt_labels)
        # Where nothing is sampled the losses are 0, whatever they are divided by.
        factor = torch.where(count > 0, wanted / count, torch.ones_like(count))
        return {name: loss * factor for name, loss in losses.items()}
