"""Forms of Mask R-CNN, of detectron2's Cascade and of `MultiStageROIHeads`, HTC's base."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from d2ext.export.forms import ExportForm, register_form
from d2ext.export.proposals import check_rpn
from d2ext.export.structures import Corners, Detections, Inputs, refuse
from d2ext.modeling import MultiStageROIHeads
from d2ext.modeling.regions.losses import pick_class
from d2ext.ops import PyramidROIAlignPooler, RoIWarpPooler
from d2ext.ops.decompositions import best_rows, pyramid_roi_align_form

from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads


def check_pooler(pooler: nn.Module) -> None:
    """Refuse poolers without a form."""
    if isinstance(pooler, RoIWarpPooler) and pooler.operator.bin_reduce != "point":
        refuse("RoI warp with bin_reduce 'edge_max'")
    if isinstance(pooler, (PyramidROIAlignPooler, RoIWarpPooler)):
        return
    if not isinstance(pooler, ROIPooler):
        refuse(f"the pooler {type(pooler).__name__}")
    for level in pooler.level_poolers:
        if not isinstance(level, ROIAlign) or not level.aligned:
            refuse(f"a pooler of {type(level).__name__}", "set POOLER_TYPE to ROIAlignV2")


def pool(pooler: nn.Module, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Region features (R, C, S, S) of boxes (R, 4), by any pooler that `check_pooler` lets pass."""
    if not isinstance(pooler, ROIPooler):
        return pooler(maps, [Corners(boxes)])
    first, levels = pooler.level_poolers[0], pooler.level_poolers
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    return pyramid_roi_align_form(
        maps, rois, [level.spatial_scale for level in levels], *first.output_size,
        sampling_ratio=first.sampling_ratio, canonical_size=pooler.canonical_box_size,
        canonical_level=pooler.canonical_level,
    )  # fmt: skip


def detect_boxes(
    boxes: Tensor, scores: Tensor, inputs: Inputs, threshold: float, overlap: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """detectron2's `fast_rcnn_inference_single_image`.

    Args:
        boxes: (R, 4) or (R, 4 K).
        scores: (R, K + 1), background last.
        threshold: scores at or below take no part.
        overlap: IoU from which on the better box of a class suppresses another.
        most: detections at most; negative: all.

    Returns:
        boxes (N, 4) in the network input, scores (N,) and classes (N,), best first.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    boxes = inputs.clip(boxes.unflatten(1, (-1, 4)))
    rows, classes = ((scores > threshold) & finite[:, None]).nonzero().unbind(1)
    boxes = boxes[rows, classes] if boxes.shape[1] > 1 else boxes[rows, 0]
    scores = scores[rows, classes]
    # One suppression for all classes, whose boxes lie apart, as in torchvision's `batched_nms`.
    apart = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    kept = nms(boxes + (classes.to(boxes.dtype) * apart)[:, None], scores, overlap)
    if most >= 0:
        kept = kept[best_rows(scores[kept], most)]
    return boxes[kept], scores[kept], classes[kept]


def in_output(found: Detections, inputs: Inputs) -> Detections:
    """Detections in the network input -> in the output image, without those that have no area."""
    extent = inputs.output_extent
    boxes = found.boxes * (extent / inputs.extent)
    boxes = torch.minimum(boxes.clamp(min=0), extent)
    solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
    return found._replace(boxes=boxes).rows(solid)


@register_form(StandardROIHeads)
class StandardForm(ExportForm):
    """Mask R-CNN."""

    def check(self) -> None:
        heads = self.model.roi_heads
        check_rpn(self.model.proposal_generator)
        if not heads.mask_on:
            refuse("a network without masks", "set MODEL.MASK_ON to True")
        if heads.keypoint_on:
            refuse("a network with keypoints", "set MODEL.KEYPOINT_ON to False")
        check_pooler(heads.box_pooler)
        if getattr(heads, "mask_pooler", None) is None:
            refuse("a mask head without a pooler of its own")
        check_pooler(heads.mask_pooler)
        if not hasattr(heads.mask_head, "layers"):
            refuse(f"the mask head {type(heads.mask_head).__name__}")

    def detect(self, features, boxes, inputs):
        heads = self.model.roi_heads
        x = pool(heads.box_pooler, [features[name] for name in heads.box_in_features], boxes)
        logits, deltas = heads.box_predictor(heads.box_head(x))
        decoded = heads.box_predictor.box2box_transform.apply_deltas(deltas, boxes)
        return [self.finish(features, decoded, F.softmax(logits, dim=-1), inputs)]

    def finish(
        self, features: dict[str, Tensor], boxes: Tensor, scores: Tensor, inputs: Inputs
    ) -> Detections:
        """From boxes and scores of all regions to detections with masks."""
        heads = self.model.roi_heads
        last = self.last_predictor()
        boxes, scores, classes = detect_boxes(
            boxes, scores, inputs, last.test_score_thresh, last.test_nms_thresh,
            last.test_topk_per_image,
        )  # fmt: skip
        x = pool(heads.mask_pooler, [features[name] for name in heads.mask_in_features], boxes)
        masks = pick_class(heads.mask_head.layers(x), classes).sigmoid()
        return in_output(Detections(boxes, scores, classes, masks), inputs)

    def last_predictor(self) -> nn.Module:
        """The one that has the thresholds."""
        return self.model.roi_heads.box_predictor


@register_form(CascadeROIHeads)
class CascadeForm(StandardForm):
    """detectron2's Cascade Mask R-CNN, whose stages share one mask head. A result after a stage is
    that of a network which ends there."""

    def __init__(self, model: nn.Module, all_stages: bool = False):
        self.stages = len(model.roi_heads.box_predictor)
        super().__init__(model, all_stages)

    def last_predictor(self) -> nn.Module:
        return self.model.roi_heads.box_predictor[-1]

    def detect(self, features, boxes, inputs):
        heads, scores, outputs = self.model.roi_heads, [], []
        maps = [features[name] for name in heads.box_in_features]
        decoded = boxes
        for head, predictor in zip(heads.box_head, heads.box_predictor):
            boxes = inputs.clip(decoded) if scores else boxes
            logits, deltas = predictor(head(pool(heads.box_pooler, maps, boxes)))
            scores.append(F.softmax(logits, dim=-1))
            decoded = predictor.box2box_transform.apply_deltas(deltas, boxes)
            if self.all_stages or len(scores) == self.stages:
                mean = sum(scores) * (1.0 / len(scores))
                outputs.append(self.finish(features, decoded, mean, inputs))
        return outputs


@register_form(MultiStageROIHeads)
class MultiStageForm(ExportForm):
    """A cascade with a mask head for each stage."""

    def __init__(self, model: nn.Module, all_stages: bool = False):
        self.stages = model.roi_heads.num_stages
        super().__init__(model, all_stages)

    def check(self) -> None:
        heads = self.model.roi_heads
        check_rpn(self.model.proposal_generator)
        if heads.soft_nms:
            refuse("Soft-NMS", "switch it off: MODEL.HTC.SOFT_NMS.METHOD '' or soft_nms ''")
        for pooler in heads.modules():
            if isinstance(pooler, ROIPooler):
                refuse("a pooler of detectron2 in a cascade", "set POOLER_TYPE to ROIAlignV2")
            if isinstance(pooler, RoIWarpPooler):
                check_pooler(pooler)

    def detect(self, features, boxes, inputs):
        heads, logits, outputs = self.model.roi_heads, [], []
        features = heads.region_features(features)
        predictor = heads.box_predictor[-1]
        for stage in range(heads.num_stages):
            scores, deltas = heads.run_stage(features, [Corners(boxes)], stage)
            transform = heads.box_predictor[stage].box2box_transform
            boxes = inputs.clip(transform.apply_deltas(deltas, boxes))
            logits.append(scores)
            if stage + 1 < heads.num_stages and not self.all_stages:
                continue
            found = detect_boxes(
                boxes, heads.merge_stages(logits), inputs, predictor.test_score_thresh,
                predictor.test_nms_thresh, predictor.test_topk_per_image,
            )  # fmt: skip
            x = heads.pool_mask_features(features, [Corners(found[0])])
            masks = heads.mask_probabilities(x, found[2], len(logits))
            outputs.append(in_output(Detections(*found, masks), inputs))
        return outputs
