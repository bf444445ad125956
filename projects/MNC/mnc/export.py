"""MNC as a program: both passes of the cascade, and the vote, with tensors alone."""

import torch
from torch import Tensor

from d2ext.export import (
    Corners,
    Detections,
    ExportForm,
    Inputs,
    refuse,
    register_drawing,
    register_form,
)
from d2ext.export.proposals import check_rpn
from d2ext.export.rcnn import check_pooler
from d2ext.modeling.regions.boxes import to_continuous, to_inclusive
from d2ext.ops.decompositions import choose_seeds_form, mask_voting_form
from d2ext.projects.mnc.heads import CategoryOutputs
from d2ext.projects.mnc.roi_heads import MNCROIHeads, category_feature
from d2ext.projects.mnc.stage_bridge import choose_classes, pick_deltas
from d2ext.projects.mnc.voting import draw_binary_masks

register_drawing("mnc")(
    lambda masks, boxes, size, threshold: draw_binary_masks(masks, boxes, size, threshold)
)


@register_form(MNCROIHeads)
class MNCForm(ExportForm):
    """Multi-task Network Cascades with three and five stages."""

    drawing = "mnc"

    def __init__(self, model: torch.nn.Module, all_stages: bool = False):
        self.stages = 2 if model.roi_heads.num_stages_test == 5 else 1
        super().__init__(model, all_stages)

    def check(self) -> None:
        heads = self.model.roi_heads
        check_rpn(self.model.proposal_generator)
        for pooler in filter(None, (heads.pooler, heads.late_pooler_test)):
            check_pooler(pooler)
        if self.model.voting.voting and self.model.voting.masks != "compat":
            refuse(
                "MODEL.MNC.OUTPUT_MASKS 'direct', whose masks have the size of the image,",
                "set it to 'compat'",
            )

    @property
    def mask_threshold(self) -> float:
        return self.model.voting.mask_threshold

    def head_features(self, features: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
        model = self.model
        if model.mask_backbone is None:
            return features
        late = model.category_backbone(inputs.images)
        return {
            **model.mask_backbone(inputs.images),
            **{category_feature(name): x for name, x in late.items()},
        }

    def detect(self, features, boxes, inputs):
        heads = self.model.roi_heads
        masks, scores, category = self._run(features, boxes, late=False)
        candidates = [(boxes, masks, scores)]
        if heads.num_stages_test == 5:
            classes = choose_classes(category.seg_logits, heads.bridge_foreground_only[False])
            deltas = pick_deltas(category.deltas, classes)
            moved = heads.box_transform.apply_deltas(deltas, boxes)
            moved = inputs.clip(moved, whole_pixel=True)
            masks, scores, _ = self._run(features, moved, late=True)
            pairs = zip(candidates[0], (moved, masks, scores))
            candidates.append(tuple(torch.cat(pair) for pair in pairs))
        used = candidates if self.all_stages else candidates[-1:]
        return [self._finish(*each, inputs) for each in used]

    def _run(
        self, features: dict[str, Tensor], boxes: Tensor, late: bool
    ) -> tuple[Tensor, Tensor, CategoryOutputs]:
        """Masks (R, M, M), scores (R, K) and outputs of two stages."""
        heads = self.model.roi_heads
        pooler = heads.late_pooler_test if late and heads.late_pooler_test else heads.pooler
        x = pooler([features[name] for name in heads.in_features], [Corners(boxes)])
        masks = heads.mask_head(x).sigmoid()
        if heads.category_in_features != heads.in_features:
            x = pooler([features[name] for name in heads.category_in_features], [Corners(boxes)])
        category = heads.category_head(x, masks)
        return masks[:, 0], category.seg_logits.softmax(dim=1)[:, :-1], category

    def _finish(self, boxes: Tensor, masks: Tensor, scores: Tensor, inputs: Inputs) -> Detections:
        voting = self.model.voting
        boxes = self._to_image(boxes, inputs)
        if voting.voting:
            found = mask_voting_form(voting.vote, boxes, masks, scores, inputs.output_sides())
            boxes, scores, classes, masks = found.boxes, found.scores, found.classes, found.masks
        else:
            seeds, classes = choose_seeds_form(voting.vote, boxes, scores)
            boxes, masks, scores = boxes[seeds], masks[seeds], scores[seeds, classes]
        return Detections(to_continuous(boxes), scores, classes, masks)

    def _to_image(self, boxes: Tensor, inputs: Inputs) -> Tensor:
        """`InstanceVoting.to_image`."""
        extent = inputs.output_extent
        factor = extent / inputs.extent
        if self.model.voting.legacy_plus_one:
            boxes = to_continuous(to_inclusive(boxes) * factor)
        else:
            boxes = boxes * factor
        high = extent - boxes.new_tensor([1.0, 1.0, 0.0, 0.0])
        low = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        return to_inclusive(torch.minimum(torch.maximum(boxes, low), high))
