"""Stages 2 to 5 of Multi-task Network Cascades (MNC paper, sections 3.2 to 5).

Stages 4 and 5 repeat stages 2 and 3 on refined boxes with the very same layers, so there is one set
of parameters; the two *passes* over it are stages 2-3 and stages 4-5.

Shape shorthand: N images, R boxes of all images, K classes, M mask size.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling.regions.batching import to_device
from d2ext.modeling.regions.boxes import pixel_boxes, sizes_of_rows
from d2ext.modeling.regions.samples import Samples, positive_rows
from d2ext.modeling.regions.targets import PackedMasks, gt_bitmaps, pack_masks, resize_masks
from d2ext.projects.mnc.box_transform import MNCBoxTransform, exact_boxes
from d2ext.projects.mnc.heads import (
    CategoryOutputs,
    MNCCategoryHead,
    MNCMaskHead,
    MNCRes5CategoryHead,
)
from d2ext.projects.mnc.losses import box_loss, class_loss, mask_loss
from d2ext.projects.mnc.pooler import build_pooler
from d2ext.projects.mnc.sampler import MNCSampler
from d2ext.projects.mnc.stage_bridge import bridge_boxes, choose_classes
from d2ext.projects.mnc.targets import mask_level_classes

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

Features = dict[str, Tensor]
_CATEGORY_HEADS = {"MNCCategoryHead": MNCCategoryHead, "MNCRes5CategoryHead": MNCRes5CategoryHead}


def category_feature(name: str) -> str:
    """The name under which an unshared feature map reaches the category head."""
    return f"category_{name}"


class _Pass(NamedTuple):
    """Predictions of two stages for the boxes of all images."""

    mask_logits: Tensor  # R x 1 x M x M
    category: CategoryOutputs
    seg_classes: Tensor  # (R,) mask-level labels, in training


@ROI_HEADS_REGISTRY.register()
class MNCROIHeads(nn.Module):
    """Mask instances, categorised instances, and the same once more on regressed boxes.

    Losses: `loss_mask_stage2`, `loss_cls_stage3`, `loss_seg_cls_stage3`,
    `loss_box_reg_stage3`; with five stages also `loss_mask_stage4`, `loss_cls_stage5`,
    `loss_seg_cls_stage5`, `loss_box_reg_stage5`.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        in_features: Sequence[str],
        pooler: nn.Module,
        mask_head: nn.Module,
        category_head: nn.Module,
        sampler: MNCSampler,
        box_transform: Box2BoxTransform,
        category_in_features: Sequence[str] | None = None,
        late_pooler_test: nn.Module | None = None,
        num_stages: int = 5,
        num_stages_test: int = 5,
        mask_loss_weight: float = 2.0,
        mask_threshold: float = 0.4,
        mask_iou_threshold: float = 0.5,
        smooth_l1_beta: float = 1.0,
        box_gradient: bool = True,
        gate_gradient: bool = True,
        box_gradient_limit: float | None = 1 / 512,
        bridge_denormalize: bool = True,
        bridge_foreground_only: Sequence[bool] = (True, False),
    ):
        """
        Args:
            num_classes: K.
            in_features: name of the one feature map that regions are warped from.
            pooler: region features R x C x S x S, differentiable in the boxes; called like
                detectron2's `ROIPooler`.
            mask_head: region features -> mask logits.
            category_head: region features and masks -> `CategoryOutputs`.
            sampler: labels and samples the boxes.
            box_transform: codec of the box deltas of the category head.
            category_in_features: name of another feature map for the category head; None to share.
            late_pooler_test: pooler of stages 4 and 5 at test time; None for `pooler`.
            num_stages, num_stages_test: 3 or 5, for training and for prediction.
            mask_loss_weight: factor of the mask losses; 1 in the paper, 2 in the release.
            mask_threshold: where masks are made binary, for targets and labels.
            mask_iou_threshold: a foreground box has its class at the mask level, too, if
                its predicted mask has at least this IoU with the ground truth.
            smooth_l1_beta: where the box loss turns from L2 to L1.
            box_gradient: let gradients flow through box coordinates, into the earlier stages
                and the RPN. False treats all boxes as constants.
            gate_gradient: let gradients flow from the category head into the masks (of boxes
                that count as foreground at the mask level). False treats the masks as constants.
            box_gradient_limit: elementwise limit of the gradient that reaches the deltas
                through refined boxes, per image; None or 0 for none.
            bridge_denormalize: False repeats an error of the release's training, which
                decodes normalised deltas as if they were not.
            bridge_foreground_only: for training and for prediction, whether the class whose deltas
                refine a box is the best foreground class even where background wins.
        """
        super().__init__()
        for name, value in (("num_stages", num_stages), ("num_stages_test", num_stages_test)):
            if value not in (3, 5):
                raise UserError(f"MNC has 3 or 5 stages: {name} is {value}")
        self.num_classes = num_classes
        self.in_features = list(in_features)
        self.category_in_features = list(category_in_features or in_features)
        self.pooler = pooler
        self.late_pooler_test = late_pooler_test
        self.mask_head = mask_head
        self.category_head = category_head
        self.sampler = sampler
        self.box_transform = box_transform
        self.num_stages = num_stages
        self.num_stages_test = num_stages_test
        self.mask_loss_weight = mask_loss_weight
        self.mask_threshold = mask_threshold
        self.mask_iou_threshold = mask_iou_threshold
        self.smooth_l1_beta = smooth_l1_beta
        self.box_gradient = box_gradient
        self.gate_gradient = gate_gradient
        self.box_gradient_limit = box_gradient_limit
        self.bridge_denormalize = bridge_denormalize
        self.bridge_foreground_only = dict(zip((True, False), bridge_foreground_only))

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own, names = cfg.MODEL.MNC, list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
        if len(names) != 1:
            raise UserError(
                f"MNC warps from one feature map; MODEL.ROI_HEADS.IN_FEATURES names {names}"
            )
        if own.CATEGORY_HEAD not in _CATEGORY_HEADS:
            raise UserError(
                f"MODEL.MNC.CATEGORY_HEAD '{own.CATEGORY_HEAD}': known are "
                f"{sorted(_CATEGORY_HEADS)}"
            )
        source = input_shape[names[0]]
        options = {
            "quantize": own.WARP_QUANTIZE,
            "aligned": own.WARP_ALIGNED,
            "border": own.WARP_BORDER,
            "bin_reduce": own.WARP_BIN_REDUCE,
        }
        shape = ShapeSpec(channels=source.channels, height=own.POOL_SIZE, width=own.POOL_SIZE)
        late = None
        if own.LEGACY_LATE_WARP_TEST:
            late = build_pooler(own.POOL_SIZE, own.POOL_SIZE, 1 / source.stride, **options)
        return {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "in_features": names,
            "category_in_features": None
            if own.SHARED_FEATURES
            else [category_feature(name) for name in names],
            "pooler": build_pooler(own.WARP_SIZE, own.POOL_SIZE, 1 / source.stride, **options),
            "late_pooler_test": late,
            "mask_head": MNCMaskHead(cfg, shape),
            "category_head": _CATEGORY_HEADS[own.CATEGORY_HEAD](cfg, shape),
            "sampler": MNCSampler(
                num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                batch_size_per_image=cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
                positive_fraction=cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION,
                iou_threshold=cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0],
            ),
            "box_transform": MNCBoxTransform(
                cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS, plus_one=own.LEGACY_PLUS_ONE
            ),
            "num_stages": own.NUM_STAGES,
            "num_stages_test": own.NUM_STAGES_TEST,
            "mask_loss_weight": own.MASK_LOSS_WEIGHT,
            "mask_threshold": own.BIN_THRESH,
            "box_gradient": own.BOX_GRADIENT,
            "gate_gradient": own.GATE_GRADIENT,
            "box_gradient_limit": own.BOX_GRAD_CLIP,
            "bridge_denormalize": own.BRIDGE_DENORMALIZE_IN_TRAIN,
            "bridge_foreground_only": (own.BRIDGE_FG_ONLY_TRAIN, own.BRIDGE_FG_ONLY_TEST),
        }

    def forward(
        self,
        images,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ):
        """
        Args:
            images: unused.
            features: name -> N x C x H x W.
            proposals: per image, with `proposal_boxes`.
            targets: per image ground truth, in training only: `gt_boxes`, `gt_classes` and
                `gt_masks`.

        Returns:
            Training: (samples, dict of losses). Inference: (list[Instances], {}), per image the
            candidates for voting of all passes: `pred_boxes` in pixels of the network input,
            `pred_masks` (n x 1 x M x M probabilities) and `class_scores` (n x K).
        """
        del images
        if self.training:
            samples = self.sample(proposals, targets)
            return samples, self.losses(features, samples, targets)
        return self.predict_stages(features, proposals)[-1], {}

    def sample(self, proposals: list[Instances], targets: list[Instances]) -> list[Samples]:
        """Boxes that train stages 2 and 3; fields as described at `MNCSampler`."""
        return self.sampler(proposals, targets, "stage2")

    # ------------------------------------------------------------------------------ the stages

    def run_mask_stage(
        self, features: Features, boxes: list[Boxes], late: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Stage 2 or 4: region features for the category head, and mask logits."""
        pooler = self.pooler
        if late and not self.training and self.late_pooler_test is not None:
            pooler = self.late_pooler_test
        if not self.box_gradient:
            boxes = [exact_boxes(b.tensor.detach()) for b in boxes]
        x = pooler([features[name] for name in self.in_features], boxes)
        logits = self.mask_head(x)
        if self.category_in_features != self.in_features:
            x = pooler([features[name] for name in self.category_in_features], boxes)
        return x, logits

    def run_pass(self, features: Features, samples: list[Samples], masks: PackedMasks) -> _Pass:
        """Stages 2 and 3, or 4 and 5, in training.

        Args:
            samples: labelled boxes.
            masks: the ground-truth masks.
        """
        boxes = [s.proposal_boxes for s in samples]
        x, logits = self.run_mask_stage(features, boxes)
        probabilities = logits.sigmoid()
        seg_classes = mask_level_classes(
            probabilities,
            samples,
            masks,
            self.num_classes,
            self.mask_threshold,
            self.mask_iou_threshold,
        )
        masks_in = self.gate(probabilities, seg_classes)
        return _Pass(logits, self.category_head(x, masks_in), seg_classes)

    def gate(self, probabilities: Tensor, seg_classes: Tensor) -> Tensor:
        """The masks (R x 1 x M x M) that the category head multiplies features by.

        As in the release, they have a gradient only for boxes that are foreground at the mask
        level.
        """
        trained = (seg_classes < self.num_classes) & self.gate_gradient
        return torch.where(trained[:, None, None, None], probabilities, probabilities.detach())

    def bridge(
        self, boxes: list[Boxes], category: CategoryOutputs, sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """Boxes that stages 4 and 5 start from, per image and in order."""
        classes = choose_classes(
            category.seg_logits.detach(), self.bridge_foreground_only[self.training]
        )
        transform = self.box_transform
        if self.training and not self.bridge_denormalize:
            transform = copy.copy(transform)
            transform.weights = (1.0,) * 4
        rows = [len(b) for b in boxes]
        refined = bridge_boxes(
            torch.cat([b.tensor for b in boxes]),
            category.deltas,
            classes,
            transform,
            sizes_of_rows(sizes, rows),
            (self.box_gradient_limit or 0) / len(boxes),
        )
        return list((refined if self.box_gradient else refined.detach()).split(rows))

    # -------------------------------------------------------------------------------- training

    def losses(
        self, features: Features, samples: list[Samples], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Weighted losses of all stages; see the class for their names."""
        masks = pack_masks([gt_bitmaps(t) for t in targets])
        first = self.run_pass(features, samples, masks)
        losses = self.pass_losses(first, samples, masks, 2)
        if self.num_stages == 5:
            boxes = [s.proposal_boxes for s in samples]
            sizes = [s.image_size for s in samples]
            refined = self.bridge(boxes, first.category, sizes)
            samples = self.sampler.label_all(refined, targets)
            second = self.run_pass(features, samples, masks)
            losses.update(self.pass_losses(second, samples, masks, 4))
        return losses

    def pass_losses(
        self, outputs: _Pass, samples: list[Samples], masks: PackedMasks, stage: int
    ) -> dict[str, Tensor]:
        """Weighted losses of two stages.

        Args:
            stage: number of the first of them, 2 or 4.
        """
        device = outputs.mask_logits.device
        counts = np.array([len(s) for s in samples])
        image = to_device(np.arange(len(samples)).repeat(counts), device)
        rows = to_device(counts, device)
        foreground, positives = positive_rows(samples, self.num_classes)
        classes = torch.cat([s.gt_classes for s in samples])
        boxes = torch.cat([s.proposal_boxes.tensor for s in samples]).detach()
        targets = resize_masks(
            masks.masks,
            masks.rows([s.gt_index[:n] for s, n in zip(samples, positives)]),
            pixel_boxes(boxes[foreground]),
            outputs.mask_logits.shape[-1],
            self.mask_threshold,
        )
        category = outputs.category
        self._log(len(foreground), outputs.seg_classes, len(samples), stage)
        mask = mask_loss(outputs.mask_logits, targets, foreground, image, len(samples))
        return {
            f"loss_mask_stage{stage}": mask * self.mask_loss_weight,
            f"loss_cls_stage{stage + 1}": class_loss(category.cls_logits, classes, image, rows),
            f"loss_seg_cls_stage{stage + 1}": class_loss(
                category.seg_logits, outputs.seg_classes, image, rows
            ),
            f"loss_box_reg_stage{stage + 1}": box_loss(
                category.deltas,
                boxes,
                torch.cat([s.gt_boxes.tensor for s in samples]),
                classes,
                self.box_transform,
                self.smooth_l1_beta,
                image,
                rows,
                foreground,
            ),
        }

    @torch.no_grad()
    def _log(self, foreground: int, seg_classes: Tensor, images: int, stage: int) -> None:
        masks = (seg_classes < self.num_classes).sum().item()
        storage = get_event_storage()
        storage.put_scalar(f"stage{stage + 1}/num_boxes", len(seg_classes) / images)
        storage.put_scalar(f"stage{stage + 1}/num_fg_boxes", foreground / images)
        storage.put_scalar(f"stage{stage + 1}/num_fg_masks", masks / images)

    # ------------------------------------------------------------------------------- inference

    def predict_stages(
        self, features: Features, proposals: list[Instances]
    ) -> list[list[Instances]]:
        """Candidates for voting as if the network ended after stage 3 and, with five stages, after
        stage 5; fields as described at `forward`."""
        sizes = [p.image_size for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        candidates, category = self._predict_pass(features, boxes, sizes, late=False)
        if self.num_stages_test == 3:
            return [candidates]
        boxes = [exact_boxes(b) for b in self.bridge(boxes, category, sizes)]
        refined, _ = self._predict_pass(features, boxes, sizes, late=True)
        return [candidates, [Instances.cat(pair) for pair in zip(candidates, refined)]]

    def _predict_pass(
        self, features: Features, boxes: list[Boxes], sizes: list[tuple[int, int]], late: bool
    ) -> tuple[list[Instances], CategoryOutputs]:
        x, logits = self.run_mask_stage(features, boxes, late)
        masks = logits.sigmoid()
        category = self.category_head(x, masks)
        # Of all outputs only the mask-level scores, and the deltas of stage 3, are used.
        scores = F.softmax(category.seg_logits.float(), dim=1)[:, :-1]
        rows = [len(b) for b in boxes]
        candidates = [
            Instances(size, pred_boxes=b, pred_masks=m, class_scores=s)
            for size, b, m, s in zip(sizes, boxes, masks.split(rows), scores.split(rows))
        ]
        return candidates, category
