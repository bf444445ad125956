"""A region proposal network that labels its anchors as MMDetection does."""

import numpy as np
import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from d2ext.modeling.regions.batching import to_device, true_rows
from d2ext.modeling.regions.boxes import clip_boxes, not_finite, sizes_of_rows
from d2ext.modeling.regions.losses import global_mean_count
from d2ext.modeling.regions.refinement import ClampedBox2BoxTransform
from d2ext.modeling.regions.sampling import best_matches
from d2ext.modeling.rpn.seeded import SeededRPN

from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

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
        index, labels = self.label_by_thresholds(iou)
        claimed = best_matches(iou, _LOW_QUALITY_IOU)
        return torch.where(claimed >= 0, claimed, index), labels.masked_fill(claimed >= 0, 1)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """As in the base class: `loss_rpn_cls` and `loss_rpn_loc`."""
        arguments = anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        if self.box_reg_loss_type == "smooth_l1":
            losses = self._smooth_l1_losses(*arguments)
        else:
            losses = super().losses(*arguments)
        count = global_mean_count((torch.stack(gt_labels) >= 0).sum(), gt_labels[0].device)
        wanted = self.batch_size_per_image * len(gt_labels)
        # Where nothing is sampled the losses are 0, whatever they are divided by.
        factor = torch.where(count > 0, wanted / count, torch.ones_like(count))
        return {name: loss * factor for name, loss in losses.items()}

    def _smooth_l1_losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Those of the base class, which asks the device again and again."""
        labels = torch.stack(gt_labels)
        valid, positive = (labels >= 0).flatten(), (labels == 1).flatten()
        num_valid, num_positive = torch.stack([valid.sum(), positive.sum()]).tolist()
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", num_positive / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (num_valid - num_positive) / len(labels))
        rows = true_rows(valid, num_valid)
        cls = F.binary_cross_entropy_with_logits(
            torch.cat(pred_objectness_logits, dim=1).flatten()[rows],
            labels.flatten()[rows].float(),
            reduction="sum",
        )
        rows, sources = true_rows(positive, num_positive), Boxes.cat(anchors).tensor
        targets = self.box2box_transform.get_deltas(
            sources[rows % len(sources)], torch.stack(gt_boxes).flatten(0, 1)[rows]
        )
        deltas = torch.cat(pred_anchor_deltas, dim=1).flatten(0, 1)[rows]
        box = smooth_l1_loss(deltas, targets, self.smooth_l1_beta, reduction="sum")
        wanted = self.batch_size_per_image * len(labels)
        losses = {"loss_rpn_cls": cls / wanted, "loss_rpn_loc": box / wanted}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """As in the base class, in training for all images and levels at once."""
        arguments = anchors, pred_objectness_logits, pred_anchor_deltas
        if not self.training:
            return super().predict_proposals(*arguments, image_sizes)
        best = [self._best_of_level(*level) for level in zip(*arguments)]
        scores, deltas, sources = (torch.cat(x, dim=1) for x in zip(*best))
        boxes = self.box2box_transform.apply_deltas(deltas.flatten(0, 1), sources.flatten(0, 1))
        all_finite = torch.isfinite(boxes).all() & torch.isfinite(scores).all()
        boxes = clip_boxes(boxes, sizes_of_rows(image_sizes, [scores.shape[1]] * len(scores)))
        kept = (boxes[:, 2:] - boxes[:, :2] > self.min_box_size).all(dim=1).view_as(scores)

        lengths = [x[0].shape[1] for x in best]
        counts = [x.sum(dim=1) for x in kept.split(lengths, dim=1)]
        all_finite, *counts = torch.cat([all_finite[None], *counts]).tolist()
        if not all_finite:
            raise not_finite("Predicted boxes or scores", scores)
        counts = np.array(counts).reshape(len(lengths), -1).T.tolist()
        rows = true_rows(kept.flatten(), sum(map(sum, counts)))
        boxes, scores = boxes[rows], scores.flatten()[rows]
        proposals = []
        images = [sum(levels) for levels in counts]
        for size, levels, b, s in zip(
            image_sizes, counts, boxes.split(images), scores.split(images)
        ):
            rows = nms_by_level(b, s, levels, self.nms_thresh)[: self.post_nms_topk[True]]
            proposals.append(
                Instances(size, proposal_boxes=Boxes(b[rows]), objectness_logits=s[rows])
            )
        return proposals

    def _best_of_level(
        self, anchors: Boxes, logits: Tensor, deltas: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N x k), deltas and anchors (N x k x 4) of the best anchors of each image."""
        logits, order = logits.sort(descending=True, dim=1)
        order = order[:, : self.pre_nms_topk[True]]
        deltas = deltas.gather(1, order[..., None].expand(-1, -1, 4))
        return logits[:, : order.shape[1]], deltas, anchors.tensor[order]


def nms_by_level(boxes: Tensor, scores: Tensor, levels: list[int], threshold: float) -> Tensor:
    """Rows of the boxes that no better one of their level suppresses, best first.

    Args:
        boxes: R x 4, one level after the other.
        scores: (R,).
        levels: number of boxes of each level.
        threshold: IoU above which the better box suppresses the other.
    """
    if boxes.is_cuda:  # one call, for which the boxes of each level are moved elsewhere
        level = to_device(np.repeat(np.arange(len(levels)), levels), boxes.device)
        return batched_nms(boxes, scores, level, threshold)
    parts = zip(boxes.float().split(levels), scores.split(levels))
    kept = [nms(b, s, threshold) for b, s in parts]
    starts = np.repeat(np.cumsum([0, *levels])[:-1], [len(rows) for rows in kept])
    kept = (torch.cat(kept) + to_device(starts, boxes.device)).sort().values
    return kept[scores[kept].sort(descending=True).indices]
