"""Region heads that run in stages, each on the boxes refined by the one before.

The base class is a complete Cascade Mask R-CNN; papers that vary the scheme override single steps:
``run_stage``, ``stage_losses``, ``merge_stages``, the two ``pool_*`` methods, or the mask branch.

Shape shorthand: N images, R regions of all images, Ri regions of image i, K classes, T stages.
"""

from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.errors import UserError

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import build_mask_head
from detectron2.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from ..box_refinement import refine_boxes
from ..losses import (
    box_regression_loss,
    classification_loss,
    crop_mask_targets,
    mask_bce_loss,
    pick_class,
)
from ..sampling import ProposalSampler
from .building import (
    box_branch_from_config,
    mask_pooling_from_config,
    samplers_from_config,
)

__all__ = ["MultiStageROIHeads"]

Features = Dict[str, Tensor]
Predictions = Tuple[Tensor, Tensor]


@ROI_HEADS_REGISTRY.register()
class MultiStageROIHeads(nn.Module):
    """Cascade Mask R-CNN (Cai & Vasconcelos, TPAMI 2019) with per-stage sampling and mask heads.

    In training a stage samples its boxes, computes its losses and hands the refined boxes on.
    At test time all boxes run through all stages, so that the scores of a row can be averaged.

    Losses are named ``loss_cls_stage0``, ``loss_box_reg_stage0``, ``loss_mask_stage0``, ...;
    a single mask head gives ``loss_mask``.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[FastRCNNOutputLayers],
        samplers: Sequence[ProposalSampler],
        mask_in_features: Optional[Sequence[str]] = None,
        mask_pooler: Optional[ROIPooler] = None,
        mask_head: Union[nn.Module, Sequence[nn.Module], None] = None,
        stage_loss_weights: Optional[Sequence[float]] = None,
        resample: bool = True,
        score_average: str = "logits",
        feature_gradient_scale: float = 1.0,
    ):
        """
        Args:
            num_classes (int): K.
            box_in_features: names of the feature maps for the box branch, high resolution first.
            box_pooler: region features of the box branch.
            box_heads, box_predictors, samplers: one per stage. The predictors are class-agnostic
                in the boxes; the last one holds the test thresholds.
            mask_in_features, mask_pooler: the same for the mask branch; None without masks.
            mask_head: one module, trained on the samples of the first stage (detectron2), or one
                per stage, trained on the samples of its stage (MMDetection). A head offers
                ``layers(x)`` like detectron2's: R x C x S x S -> R x K x 2S x 2S logits.
            stage_loss_weights: factor of the losses of each stage; None for 1.
            resample (bool): ground truths that a sampler appended are not handed on, because the
                next stage appends them again (MMDetection). False hands everything on except
                empty boxes (detectron2); then the samplers of later stages should keep all boxes.
            score_average (str): "logits" averages the class logits over the stages before the
                softmax, "probs" the probabilities.
            feature_gradient_scale (float): factor of the gradient into the pooled box features;
                detectron2's CascadeROIHeads uses 1/T.
        """
        super().__init__()
        self.num_classes = num_classes
        self.box_in_features = list(box_in_features)
        self.box_pooler = box_pooler
        self.box_head = nn.ModuleList(list(box_heads))
        self.box_predictor = nn.ModuleList(list(box_predictors))
        self.samplers = list(samplers)
        self.num_stages = len(self.box_head)
        self.stage_loss_weights = list(stage_loss_weights or [1.0] * self.num_stages)
        self.resample = resample
        if score_average not in ("logits", "probs"):
            raise UserError(f"score_average '{score_average}' is neither 'logits' nor 'probs'.")
        self.score_average = score_average
        self.feature_gradient_scale = feature_gradient_scale

        self.mask_on = mask_head is not None
        if self.mask_on:
            single = isinstance(mask_head, nn.Module)
            self.mask_in_features = list(mask_in_features)
            self.mask_pooler = mask_pooler
            self.mask_head = mask_head if single else nn.ModuleList(list(mask_head))
        lengths = {
            "box_predictors": len(self.box_predictor),
            "samplers": len(self.samplers),
            "stage_loss_weights": len(self.stage_loss_weights),
        }
        if self.mask_on and not single:
            lengths["mask_head"] = len(self.mask_head)
        for name, length in lengths.items():
            if length != self.num_stages:
                raise UserError(f"{self.num_stages} box_heads, but {length} {name}.")

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        own = cfg.MODEL.MULTI_STAGE
        ret = box_branch_from_config(cfg, input_shape, own.CLAMP_BOTH_SIDES)
        ret["samplers"] = samplers_from_config(cfg, own.RESAMPLE, own.REASSIGN_LOW_QUALITY)
        ret["stage_loss_weights"] = own.STAGE_LOSS_WEIGHTS
        ret["resample"] = own.RESAMPLE
        ret["score_average"] = own.SCORE_AVERAGE
        ret["feature_gradient_scale"] = own.FEATURE_GRADIENT_SCALE
        if cfg.MODEL.MASK_ON:
            pooling, shape = mask_pooling_from_config(cfg, input_shape)
            ret.update(pooling)
            stages = len(ret["box_heads"]) if own.MASK_HEAD_PER_STAGE else 1
            heads = [build_mask_head(cfg, shape) for _ in range(stages)]
            ret["mask_head"] = heads if own.MASK_HEAD_PER_STAGE else heads[0]
        return ret

    def forward(
        self,
        images,
        features: Features,
        proposals: List[Instances],
        targets: Optional[List[Instances]] = None,
    ):
        """
        Args:
            images (ImageList): unused here.
            features: name -> N x C x H x W.
            proposals: per image, with ``proposal_boxes``.
            targets: per image ground truth, in training only: ``gt_boxes``, ``gt_classes`` and,
                with a mask branch, ``gt_masks``.

        Returns:
            Training: (proposals, dict of losses). Inference: (list[Instances], {}) with
            ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` (Ri x 1 x M x M
            probabilities).
        """
        del images
        if self.training:
            return proposals, self.losses(features, proposals, targets)
        return self.predict(features, proposals), {}

    # ------------------------------------------------------------------------------ the stages

    def pool_box_features(self, features: Features, boxes: List[Boxes]) -> Tensor:
        """Region features (R x C x S x S) of the box branch."""
        # detectron2 rounds box coordinates to the type of the features, half a pixel at 1000 in
        # mixed precision; float() is free for single precision.
        return self.box_pooler([features[name].float() for name in self.box_in_features], boxes)

    def pool_mask_features(self, features: Features, boxes: List[Boxes]) -> Tensor:
        """Region features (R x C x S x S) of the mask branch."""
        return self.mask_pooler([features[name].float() for name in self.mask_in_features], boxes)

    def run_stage(self, features: Features, boxes: List[Boxes], stage: int) -> Predictions:
        """Class logits (R x (K + 1)) and deltas (R x 4) of one stage for its boxes."""
        x = self.pool_box_features(features, boxes)
        if self.feature_gradient_scale != 1.0 and x.requires_grad:
            x.register_hook(lambda gradient: gradient * self.feature_gradient_scale)
        return self.box_predictor[stage](self.box_head[stage](x))

    def refine(
        self, boxes: List[Boxes], predictions: Predictions, sizes: List[Tuple[int, int]], stage: int
    ) -> List[Boxes]:
        """The boxes after a stage, clipped to the image, without gradient, row by row."""
        transform = self.box_predictor[stage].box2box_transform
        return refine_boxes(boxes, predictions[1], transform, sizes)

    # -------------------------------------------------------------------------------- training

    def losses(
        self, features: Features, proposals: List[Instances], targets: List[Instances]
    ) -> Dict[str, Tensor]:
        """All losses of all stages; see the class docstring for their names."""
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
            if self.mask_on:
                samples = self.mask_samples(samples, boxes, targets, stage)
                losses.update(self.mask_losses(features, samples, targets, stage))
        return losses

    def boxes_to_hand_on(self, samples: List[Instances], refined: List[Boxes]) -> List[Boxes]:
        """Of the refined boxes of a stage, those that the next stage starts from."""
        if self.resample:
            return [boxes[~s.is_gt] for s, boxes in zip(samples, refined)]
        return [boxes[boxes.nonempty()] for boxes in refined]

    def stage_losses(
        self, predictions: Predictions, samples: List[Instances], stage: int
    ) -> Dict[str, Tensor]:
        """Weighted classification and box losses of one stage on its samples."""
        logits, deltas = predictions
        predictor = self.box_predictor[stage]
        if predictor.box_reg_loss_type != "smooth_l1":
            raise UserError("Set MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE to 'smooth_l1'.")
        classes = torch.cat([s.gt_classes for s in samples])
        self._log_classification(logits, classes, len(samples), stage)
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

    def _log_classification(self, logits: Tensor, classes: Tensor, images: int, stage: int) -> None:
        with torch.no_grad():
            foreground = classes < self.num_classes
            correct = logits.argmax(dim=1) == classes
            counts = torch.stack([foreground.sum(), correct.sum(), correct[foreground].sum()])
            num_foreground, num_correct, foreground_correct = counts.tolist()
        storage = get_event_storage()
        storage.put_scalar(f"stage{stage}/num_fg_samples", num_foreground / images)
        storage.put_scalar(f"stage{stage}/num_bg_samples", (len(classes) - num_foreground) / images)
        if len(classes):
            storage.put_scalar(f"stage{stage}/cls_accuracy", num_correct / len(classes))
        if num_foreground:
            storage.put_scalar(f"stage{stage}/fg_cls_accuracy", foreground_correct / num_foreground)

    def mask_samples(
        self,
        samples: List[Instances],
        boxes: List[Boxes],
        targets: List[Instances],
        stage: int,
    ) -> List[Instances]:
        """Labelled boxes that train the mask branch of a stage: here, those of its box branch.

        Args:
            samples: the samples of the stage's box branch.
            boxes: the boxes that the stage hands on.
        """
        return samples

    def mask_losses(
        self, features: Features, samples: List[Instances], targets: List[Instances], stage: int
    ) -> Dict[str, Tensor]:
        """Weighted mask loss of one stage on the positives among the samples."""
        per_stage = isinstance(self.mask_head, nn.ModuleList)
        if stage > 0 and not per_stage:
            return {}
        positives = [s[s.gt_classes < self.num_classes] for s in samples]
        x = self.pool_mask_features(features, [p.proposal_boxes for p in positives])
        logits = self.mask_logits(x, stage)
        masks = [
            crop_mask_targets(t.gt_masks, p.gt_index, p.proposal_boxes.tensor, logits.shape[-1])
            for p, t in zip(positives, targets)
            if len(p)  # images without objects may lack the field gt_masks
        ]
        loss = mask_bce_loss(logits, torch.cat([p.gt_classes for p in positives]), masks)
        name = f"loss_mask_stage{stage}" if per_stage else "loss_mask"
        return {name: loss * self.stage_loss_weights[stage]}

    def mask_logits(self, x: Tensor, stage: int) -> Tensor:
        """Logits (R x K x M x M) with which the mask branch of a stage is trained."""
        heads = self.mask_head
        return (heads[stage] if isinstance(heads, nn.ModuleList) else heads).layers(x)

    # ------------------------------------------------------------------------------- inference

    def merge_stages(self, logits: Sequence[Tensor]) -> Tensor:
        """Class probabilities (R x (K + 1)) from the class logits of the stages so far."""
        if self.score_average == "logits":
            return F.softmax(sum(logits) / len(logits), dim=1)
        return sum(F.softmax(x, dim=1) for x in logits) / len(logits)

    def mask_probabilities(self, x: Tensor, classes: Tensor, stages: int) -> Tensor:
        """Mask probabilities (R x M x M) of the given classes, merged over the first stages."""
        heads = self.mask_head
        heads = list(heads)[:stages] if isinstance(heads, nn.ModuleList) else [heads]
        return sum(pick_class(head.layers(x), classes).sigmoid() for head in heads) / len(heads)

    def predict(self, features: Features, proposals: List[Instances]) -> List[Instances]:
        """Detections of the whole cascade; fields as described at :meth:`forward`."""
        *_, last = self._run_cascade(features, proposals)
        return self._detect(features, *last)

    def predict_stages(
        self, features: Features, proposals: List[Instances]
    ) -> List[List[Instances]]:
        """Detections as if the cascade ended after stage 1, 2, ..., T; one list per stage."""
        return [self._detect(features, *out) for out in self._run_cascade(features, proposals)]

    def forward_with_given_boxes(
        self, features: Features, instances: List[Instances], stages: Optional[int] = None
    ) -> List[Instances]:
        """Add ``pred_masks`` (Ri x 1 x M x M probabilities) to instances with known boxes.

        Args:
            instances: per image, with ``pred_boxes`` and ``pred_classes``.
            stages (int): use the mask heads of the first stages only; None for all.
        """
        if not self.mask_on:
            return instances
        x = self.pool_mask_features(features, [i.pred_boxes for i in instances])
        classes = torch.cat([i.pred_classes for i in instances])
        masks = self.mask_probabilities(x, classes, stages or self.num_stages)
        for image, image_masks in zip(instances, masks[:, None].split([len(i) for i in instances])):
            image.pred_masks = image_masks
        return instances

    def _run_cascade(self, features: Features, proposals: List[Instances]):
        """Yields after every stage: merged probabilities, refined boxes, image sizes, #stages."""
        sizes = [p.image_size for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        logits = []
        for stage in range(self.num_stages):
            predictions = self.run_stage(features, boxes, stage)
            boxes = self.refine(boxes, predictions, sizes, stage)
            logits.append(predictions[0].float())
            yield self.merge_stages(logits), boxes, sizes, stage + 1

    def _detect(
        self,
        features: Features,
        scores: Tensor,
        boxes: List[Boxes],
        sizes: List[Tuple[int, int]],
        stages: int,
    ) -> List[Instances]:
        predictor = self.box_predictor[-1]
        instances, _ = fast_rcnn_inference(
            [b.tensor for b in boxes],
            list(scores.split([len(b) for b in boxes])),
            sizes,
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return self.forward_with_given_boxes(features, instances, stages)
