"""Region heads that run in stages, each on the boxes refined by the one before.

The base class is a complete Cascade Mask R-CNN; papers that vary the scheme override single steps:
`region_features`, `run_stage`, `stage_losses`, `merge_stages`, the two `pool_*` methods,
or the mask branch.

Shape shorthand: N images, R regions of all images, Ri regions of image i, K classes, T stages.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling.regions.losses import (
    box_regression_loss,
    classification_loss,
    mask_bce_loss,
    pick_class,
)
from d2ext.modeling.regions.refinement import refine_boxes
from d2ext.modeling.regions.samples import Samples
from d2ext.modeling.regions.sampling import ProposalSampler
from d2ext.modeling.regions.soft_nms import detect_softly, make_soft_nms
from d2ext.modeling.regions.targets import align_masks

from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

Features = dict[str, Tensor]
Predictions = tuple[Tensor, Tensor]


class MultiStageROIHeads(nn.Module):
    """Cascade Mask R-CNN (Cai & Vasconcelos, TPAMI 2019) with per-stage sampling and mask heads, as
    in MMDetection.

    In training a stage samples its boxes, computes its losses and hands the refined boxes on.
    At test time all boxes run through all stages, so that the scores of a row can be averaged.

    Losses are named `loss_cls_stage0`, `loss_box_reg_stage0`, `loss_mask_stage0`, ...
    """

    # Not taken over from weights, see `d2ext.checkpoint.settings`.
    user_choices: tuple[str, ...] = ("score_average",)
    takes_soft_nms = True

    def __init__(
        self,
        *,
        num_classes: int,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[FastRCNNOutputLayers],
        samplers: Sequence[ProposalSampler],
        mask_in_features: Sequence[str],
        mask_pooler: ROIPooler,
        mask_head: Sequence[nn.Module],
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        score_average: str = "logits",
        soft_nms: str = "",
        soft_nms_sigma: float = 0.5,
        soft_nms_min_score: float = 1e-3,
    ):
        """
        Args:
            num_classes: K.
            box_in_features: names of the feature maps for the box branch, high resolution first.
            box_pooler: region features of the box branch.
            box_heads, box_predictors, samplers: one per stage. The predictors are class-agnostic
                in the boxes; the last one holds the test thresholds.
            mask_in_features, mask_pooler: the same for the mask branch.
            mask_head: one per stage. It offers `layers(x)` like detectron2's: R x C x S x S ->
                R x K x 2S x 2S logits.
            stage_loss_weights: factor of the losses of each stage.
            score_average: "logits" averages the class logits over the stages before the
                softmax, "probs" the probabilities.
            soft_nms: "linear" or "gaussian" lowers the scores of boxes that overlap a better one,
                linear from the test threshold of NMS on; "" removes these boxes.
            soft_nms_sigma: of the Gaussian.
            soft_nms_min_score: boxes are left out once their score is lower.
        """
        super().__init__()
        self.num_classes = num_classes
        self.box_in_features = list(box_in_features)
        self.box_pooler = box_pooler
        self.box_head = nn.ModuleList(list(box_heads))
        self.box_predictor = nn.ModuleList(list(box_predictors))
        self.samplers = list(samplers)
        self.num_stages = len(self.box_head)
        self.stage_loss_weights = list(stage_loss_weights)
        if score_average not in ("logits", "probs"):
            raise UserError(f"score_average '{score_average}' is neither 'logits' nor 'probs'")
        self.score_average = score_average
        threshold = self.box_predictor[-1].test_nms_thresh
        self.soft_nms = make_soft_nms(soft_nms, threshold, soft_nms_sigma, soft_nms_min_score)
        self.mask_in_features = list(mask_in_features)
        self.mask_pooler = mask_pooler
        self.mask_head = nn.ModuleList(list(mask_head))
        # detectron2's test-time augmentation turns the masks off for a while.
        self.mask_on = True
        lengths = {
            "box_predictors": len(self.box_predictor),
            "samplers": len(self.samplers),
            "stage_loss_weights": len(self.stage_loss_weights),
            "mask_head": len(self.mask_head),
        }
        for name, length in lengths.items():
            if length != self.num_stages:
                raise UserError(f"{self.num_stages} box_heads, but {length} {name}")

    def forward(
        self,
        images,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ):
        """
        Args:
            images: unused here.
            features: name -> N x C x H x W.
            proposals: per image, with `proposal_boxes`.
            targets: per image ground truth, in training only: `gt_boxes`, `gt_classes` and
                `gt_masks`.

        Returns:
            Training: (proposals, dict of losses). Inference: (list[Instances], {}) with
            `pred_boxes`, `scores`, `pred_classes` and `pred_masks` (Ri x 1 x M x M
            probabilities).
        """
        del images
        if self.training:
            return proposals, self.losses(self.region_features(features), proposals, targets)
        return self.predict(features, proposals), {}

    def region_features(self, features: Features) -> Any:
        """What the two `pool_*` methods read, made once per image from the backbone's maps."""
        return features

    # ------------------------------------------------------------------------------ the stages

    def pool_box_features(self, features: Any, boxes: list[Boxes]) -> Tensor:
        """Region features (R x C x S x S) of the box branch."""
        # detectron2 rounds box coordinates to the type of the features, half a pixel at 1000 in
        # mixed precision; float() is free for single precision.
        return self.box_pooler([features[name].float() for name in self.box_in_features], boxes)

    def pool_mask_features(self, features: Any, boxes: list[Boxes]) -> Tensor:
        """Region features (R x C x S x S) of the mask branch."""
        return self.mask_pooler([features[name].float() for name in self.mask_in_features], boxes)

    def run_stage(self, features: Any, boxes: list[Boxes], stage: int) -> Predictions:
        """Class logits (R x (K + 1)) and deltas (R x 4) of one stage for its boxes."""
        return self.box_predictor[stage](
            self.box_head[stage](self.pool_box_features(features, boxes))
        )

    def refine(
        self, boxes: list[Boxes], predictions: Predictions, sizes: list[tuple[int, int]], stage: int
    ) -> list[Boxes]:
        """The boxes after a stage, clipped to the image, without gradient, row by row."""
        transform = self.box_predictor[stage].box2box_transform
        return refine_boxes(boxes, predictions[1], transform, sizes)

    # -------------------------------------------------------------------------------- training

    def losses(
        self, features: Any, proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """All losses of all stages; see the class for their names.

        Args:
            features: from `region_features`.
        """
        losses = {}
        sizes = [p.image_size for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        for stage in range(self.num_stages):
            samples = self.samplers[stage](boxes, targets, f"stage{stage}_box")
            sampled_boxes = [s.proposal_boxes for s in samples]
            predictions = self.run_stage(features, sampled_boxes, stage)
            losses.update(self.stage_losses(predictions, samples, stage))
            boxes = self.boxes_to_hand_on(
                samples, self.refine(sampled_boxes, predictions, sizes, stage)
            )
            samples = self.mask_samples(samples, boxes, targets, stage)
            losses.update(self.mask_losses(features, samples, targets, stage))
        return losses

    def boxes_to_hand_on(self, samples: list[Samples], refined: list[Boxes]) -> list[Boxes]:
        """Of the refined boxes of a stage, those that the next stage starts from: not the ground
        truths that the sampler appended, because the next one appends them again."""
        return [boxes[s.num_gt :] for s, boxes in zip(samples, refined)]

    def stage_losses(
        self, predictions: Predictions, samples: list[Samples], stage: int
    ) -> dict[str, Tensor]:
        """Weighted classification and box losses of one stage on its samples."""
        logits, deltas = predictions
        predictor = self.box_predictor[stage]
        if predictor.box_reg_loss_type != "smooth_l1":
            raise UserError("set MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE to 'smooth_l1'")
        classes = torch.cat([s.gt_classes for s in samples])
        self._log_classification(logits, classes, samples, stage)
        losses = {
            "loss_cls": classification_loss(logits, classes),
            "loss_box_reg": box_regression_loss(
                deltas,
                samples,
                predictor.box2box_transform,
                self.num_classes,
                predictor.smooth_l1_beta,
            ),
        }
        weight = self.stage_loss_weights[stage]
        return {
            f"{name}_stage{stage}": loss * (weight * predictor.loss_weight.get(name, 1.0))
            for name, loss in losses.items()
        }

    @torch.no_grad()
    def _log_classification(
        self, logits: Tensor, classes: Tensor, samples: list[Samples], stage: int
    ) -> None:
        correct, num_foreground = (
            logits.argmax(dim=1) == classes,
            sum(s.num_positive for s in samples),
        )
        right = torch.stack([correct, correct & (classes < self.num_classes)]).sum(dim=1)
        num_correct, foreground_correct = right.tolist()
        storage, images = get_event_storage(), len(samples)
        storage.put_scalar(f"stage{stage}/num_fg_samples", num_foreground / images)
        storage.put_scalar(f"stage{stage}/num_bg_samples", (len(classes) - num_foreground) / images)
        if len(classes):
            storage.put_scalar(f"stage{stage}/cls_accuracy", num_correct / len(classes))
        if num_foreground:
            storage.put_scalar(f"stage{stage}/fg_cls_accuracy", foreground_correct / num_foreground)

    def mask_samples(
        self,
        samples: list[Samples],
        boxes: list[Boxes],
        targets: list[Instances],
        stage: int,
    ) -> list[Samples]:
        """Labelled boxes that train the mask branch of a stage: here, those of its box branch.

        Args:
            samples: the samples of the stage's box branch.
            boxes: the boxes that the stage hands on.
        """
        return samples

    def mask_losses(
        self, features: Any, samples: list[Samples], targets: list[Instances], stage: int
    ) -> dict[str, Tensor]:
        """Weighted mask loss of one stage on the positives among the samples."""
        boxes = [s.proposal_boxes[: s.num_positive] for s in samples]
        logits = self.mask_logits(self.pool_mask_features(features, boxes), stage)
        masks = [
            align_masks(t.gt_masks, s.gt_index[: len(b)], b.tensor, logits.shape[-1])
            for s, b, t in zip(samples, boxes, targets)
            if len(b)  # images without objects may lack the field gt_masks
        ]
        classes = torch.cat([s.gt_classes[: len(b)] for s, b in zip(samples, boxes)])
        loss = mask_bce_loss(logits, classes, masks)
        return {f"loss_mask_stage{stage}": loss * self.stage_loss_weights[stage]}

    def mask_logits(self, x: Tensor, stage: int) -> Tensor:
        """Logits (R x K x M x M) with which the mask branch of a stage is trained."""
        return self.mask_head[stage].layers(x)

    # ------------------------------------------------------------------------------- inference

    def merge_stages(self, logits: Sequence[Tensor]) -> Tensor:
        """Class probabilities (R x (K + 1)) from the class logits of the stages so far."""
        if self.score_average == "logits":
            return F.softmax(sum(logits) / len(logits), dim=1)
        return sum(F.softmax(x, dim=1) for x in logits) / len(logits)

    def mask_probabilities(self, x: Tensor, classes: Tensor, stages: int) -> Tensor:
        """Mask probabilities (R x M x M) of the given classes, merged over the first stages."""
        masks = [pick_class(self.mask_logits(x, i), classes).sigmoid() for i in range(stages)]
        return sum(masks) / len(masks)

    def predict(self, features: Features, proposals: list[Instances]) -> list[Instances]:
        """Detections of the whole cascade; fields as described at `forward`."""
        features = self.region_features(features)
        *_, last = self._run_cascade(features, proposals)
        return self._detect(features, proposals, *last)

    def predict_stages(
        self, features: Features, proposals: list[Instances]
    ) -> list[list[Instances]]:
        """Detections as if the cascade ended after stage 1, 2, ..., T; one list per stage."""
        features = self.region_features(features)
        stages = self._run_cascade(features, proposals)
        return [self._detect(features, proposals, *stage) for stage in stages]

    def forward_with_given_boxes(
        self, features: Features, instances: list[Instances]
    ) -> list[Instances]:
        """Add `pred_masks` (Ri x 1 x M x M probabilities) to instances with known boxes.

        Args:
            instances: per image, with `pred_boxes` and `pred_classes`.
        """
        return self._add_masks(self.region_features(features), instances, self.num_stages)

    def _run_cascade(
        self, features: Any, proposals: list[Instances]
    ) -> Iterator[tuple[list[Tensor], list[Boxes]]]:
        """Yields after every stage the class logits of all stages so far, and the refined boxes."""
        sizes = [p.image_size for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        logits: list[Tensor] = []
        for stage in range(self.num_stages):
            predictions = self.run_stage(features, boxes, stage)
            boxes = self.refine(boxes, predictions, sizes, stage)
            logits = [*logits, predictions[0].float()]
            yield logits, boxes

    def _detect(
        self, features: Any, proposals: list[Instances], logits: list[Tensor], boxes: list[Boxes]
    ) -> list[Instances]:
        """What the stages that gave the logits, and at last the boxes, detect."""
        predictor = self.box_predictor[-1]
        threshold, most = predictor.test_score_thresh, predictor.test_topk_per_image
        scores = self.merge_stages(logits).split([len(b) for b in boxes])
        sizes = [p.image_size for p in proposals]
        if self.soft_nms:
            instances = [
                detect_softly(b.tensor, s, size, threshold, self.soft_nms, most)
                for b, s, size in zip(boxes, scores, sizes)
            ]
        else:
            instances, _ = fast_rcnn_inference(
                [b.tensor for b in boxes],
                list(scores),
                sizes,
                threshold,
                predictor.test_nms_thresh,
                most,
            )
        return self._add_masks(features, instances, len(logits))

    def _add_masks(self, features: Any, instances: list[Instances], stages: int) -> list[Instances]:
        if not self.mask_on:
            return instances
        x = self.pool_mask_features(features, [i.pred_boxes for i in instances])
        classes = torch.cat([i.pred_classes for i in instances])
        masks = self.mask_probabilities(x, classes, stages)
        for image, image_masks in zip(instances, masks[:, None].split([len(i) for i in instances])):
            image.pred_masks = image_masks
        return instances
