"""The region heads of Mask Scoring R-CNN: detectron2's, whose masks get scores of their own."""

from typing import Any

import torch
from torch import Tensor, nn

from d2ext.errors import UserError
from mask_scoring.mask_iou_head import MaskIoUHead
from mask_scoring.targets import mask_iou_targets

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Instances


def mask_iou_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error over the N masks that overlap their object at all."""
    errors = (predicted.float() - targets)[targets > 0]
    return 0.5 * errors.square().mean() if len(errors) else predicted.sum() * 0


@ROI_HEADS_REGISTRY.register()
class MaskScoringROIHeads(StandardROIHeads):
    """Adds `loss_mask_iou` in training and `mask_scores` to the results otherwise."""

    @configurable
    def __init__(self, *, mask_iou_head: nn.Module, rescore: bool = True, **kwargs):
        """
        Args:
            mask_iou_head: see `MaskIoUHead`.
            rescore: give results `mask_scores`, the score of the box times the predicted IoU.
            kwargs: of detectron2's `StandardROIHeads`, with a mask head and its pooler.
        """
        super().__init__(**kwargs)
        self.mask_iou_head = mask_iou_head
        self.rescore = rescore

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if not (cfg.MODEL.MASK_ON and cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE):
            raise UserError(
                "MaskScoringROIHeads needs MODEL.MASK_ON=True and MODEL.ROI_MASK_HEAD.POOLER_TYPE"
            )
        found = super().from_config(cfg, input_shape)
        channels = input_shape[found["mask_in_features"][0]].channels
        side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        shape = ShapeSpec(channels=channels, height=side, width=side)
        found["mask_iou_head"] = MaskIoUHead(cfg, shape)
        found["rescore"] = cfg.MODEL.MASK_SCORING.RESCORE
        return found

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]):
        """As in the base class: losses in training, else the instances, with masks."""
        if self.training:
            # The samples of both heads: regions that overlap an object by IoU 0.5 (section 3.3).
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        x = self.mask_pooler([features[f] for f in self.mask_in_features], boxes)
        logits = self.mask_head.layers(x)
        classes = cat([x.gt_classes if self.training else x.pred_classes for x in instances])
        rows = torch.arange(len(classes), device=classes.device)
        chosen = classes if logits.shape[1] > 1 else torch.zeros_like(classes)
        masks = logits[rows, chosen].sigmoid()[:, None]
        ious = self.mask_iou_head(x, masks)[rows, classes]
        if self.training:
            loss_mask = mask_rcnn_loss(logits, instances, self.mask_head.vis_period)
            return {
                "loss_mask": loss_mask * self.mask_head.loss_weight,
                "loss_mask_iou": mask_iou_loss(ious, mask_iou_targets(masks, instances)),
            }
        mask_rcnn_inference(logits, instances)
        if self.rescore:
            for found, iou in zip(instances, ious.split([len(x) for x in instances])):
                found.mask_scores = found.scores * iou
        return instances
