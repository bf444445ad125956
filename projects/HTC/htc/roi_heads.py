"""The region heads of Hybrid Task Cascade: what the paper adds to Cascade Mask R-CNN, each addition
behind a switch (HTC paper, section 3)."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from d2ext.errors import UserError
from d2ext.modeling import MultiStageROIHeads, build_region_pooler
from d2ext.modeling.cascade.from_config import cascade_from_config
from d2ext.modeling.regions.losses import pick_class
from d2ext.ops import pool_averaged
from d2ext.projects.htc.mask_head import HTCMaskHead
from d2ext.projects.htc.semantic_head import FusedSemanticHead

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances


class HTCFeatures(NamedTuple):
    """What regions are pooled from.

    Attributes:
        pyramid: name -> N x C x H x W.
        shared: N x D x H x W features of the semantic branch before its two outputs; None without.
        embedding: N x C x H x W, its features for regions; None without the branch.
    """

    pyramid: dict[str, Tensor]
    shared: Tensor | None = None
    embedding: Tensor | None = None


@ROI_HEADS_REGISTRY.register()
class HTCROIHeads(MultiStageROIHeads):
    """Cascade Mask R-CNN with interleaved execution, mask information flow and semantic fusion.

    With all three switched off it is MMDetection's Cascade Mask R-CNN: one mask head per stage,
    trained on the samples of the stage, averaged at test time.
    """

    user_choices = ("score_average", "mask_ensemble")

    @configurable
    def __init__(
        self,
        *,
        mask_head: Sequence[HTCMaskHead],
        interleaved: bool = True,
        mask_info_flow: bool = True,
        mask_ensemble: str = "mean",
        semantic_head: FusedSemanticHead | None = None,
        semantic_pooler: nn.Module | None = None,
        semantic_fusion: Sequence[str] = ("box", "mask"),
        **kwargs,
    ):
        """
        Args:
            mask_head: one per stage; with `mask_info_flow`, all but the first with
                `information_flow=True`.
            interleaved: train the mask head of a stage on boxes refined by the stage's box
                head, sampled anew, instead of on the samples of the box head. Training only.
            mask_info_flow: give mask head t the features of head t-1, computed by the chain
                of all heads before it on the regions of stage t.
            mask_ensemble: "mean" of the mask probabilities of all stages, or the "last" ones.
            semantic_head: the semantic branch; None for none.
            semantic_pooler: pools its embedding at the resolution of the mask branch, from one
                level for boxes of all sizes. Required with `semantic_head`.
            semantic_fusion: the branches, "box" and "mask", that use the embedding.
            kwargs: arguments of `MultiStageROIHeads`.
        """
        super().__init__(mask_head=mask_head, **kwargs)
        self.interleaved = interleaved
        self.mask_info_flow = mask_info_flow
        flows = [head.information_flow for head in self.mask_head]
        if flows != [mask_info_flow and stage > 0 for stage in range(self.num_stages)]:
            raise UserError(
                f"mask_info_flow={mask_info_flow} does not fit the mask heads, which have "
                f"information_flow={flows}: all but the first need the value of mask_info_flow"
            )
        if mask_ensemble not in ("mean", "last"):
            raise UserError(f"MASK_ENSEMBLE '{mask_ensemble}' is neither 'mean' nor 'last'")
        self.mask_ensemble = mask_ensemble
        self.semantic_head = semantic_head
        self.semantic_pooler = semantic_pooler
        self.semantic_fusion = set(semantic_fusion) if semantic_head is not None else set()
        if not self.semantic_fusion <= {"box", "mask"}:
            raise UserError(
                f"SEMANTIC.FUSION {sorted(self.semantic_fusion)}: only 'box' and 'mask' exist"
            )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own = cfg.MODEL.HTC
        if not cfg.MODEL.MASK_ON:
            raise UserError("HTCROIHeads needs MODEL.MASK_ON True")
        ret, shape = cascade_from_config(
            cfg, input_shape, reassign_low_quality=own.REASSIGN_LOW_QUALITY
        )
        ret["mask_head"] = [
            HTCMaskHead(cfg, shape, information_flow=own.MASK_INFO_FLOW and stage > 0)
            for stage in range(len(ret["box_heads"]))
        ]
        ret["stage_loss_weights"] = own.STAGE_LOSS_WEIGHTS
        ret["score_average"] = own.SCORE_AVERAGE
        ret["interleaved"] = own.INTERLEAVED
        ret["mask_info_flow"] = own.MASK_INFO_FLOW
        ret["mask_ensemble"] = own.MASK_ENSEMBLE
        if own.SEMANTIC.ENABLED:
            head = ret["semantic_head"] = FusedSemanticHead(cfg, input_shape)
            ret["semantic_pooler"] = build_region_pooler(
                output_size=cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
                scales=(1.0 / head.stride,),
                sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
                pooler_type=cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE,
            )
            ret["semantic_fusion"] = own.SEMANTIC.FUSION
        return ret

    def forward(
        self,
        images,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        semantic_labels: Tensor | None = None,
    ):
        """As in the base class.

        Args:
            semantic_labels: N x H x W int64 labels of the padded images; in training with
                a semantic branch.
        """
        if not self.training:
            return super().forward(images, features, proposals)
        if self.semantic_head is not None and semantic_labels is None:
            raise UserError(
                "no semantic labels: set MODEL.META_ARCHITECTURE to HybridTaskCascade, "
                "or MODEL.HTC.SEMANTIC.ENABLED False"
            )
        features = self.region_features(features)
        losses = self.losses(features, proposals, targets)
        if self.semantic_head is not None:
            losses.update(self.semantic_head.losses(features.shared, semantic_labels))
        return proposals, losses

    def region_features(self, features: dict[str, Tensor]) -> HTCFeatures:
        if self.semantic_head is None:
            return HTCFeatures(features)
        return HTCFeatures(features, *self.semantic_head(features))

    def pool_box_features(self, features: HTCFeatures, boxes: list[Boxes]) -> Tensor:
        x = super().pool_box_features(features.pyramid, boxes)
        if "box" not in self.semantic_fusion:
            return x
        # Pooled fine and averaged: aligning at the box resolution directly would sample elsewhere.
        embedding = [features.embedding.float()]
        return x + pool_averaged(
            self.semantic_pooler, embedding, boxes, self.box_pooler.output_size
        )

    def pool_mask_features(self, features: HTCFeatures, boxes: list[Boxes]) -> Tensor:
        x = super().pool_mask_features(features.pyramid, boxes)
        if "mask" not in self.semantic_fusion:
            return x
        return x + self.semantic_pooler([features.embedding.float()], boxes)

    def mask_samples(
        self,
        samples: list[Instances],
        boxes: list[Boxes],
        targets: list[Instances],
        stage: int,
    ) -> list[Instances]:
        if not self.interleaved:
            return samples
        return self.samplers[stage](boxes, targets, f"stage{stage}_mask")

    def _mask_features(self, x: Tensor, stages: int) -> list[Tensor]:
        """Trunk features of the first mask heads, all on the same regions.

        Features of earlier heads are computed anew for the regions of every stage, with gradient.
        """
        features: list[Tensor] = []
        for head in list(self.mask_head)[:stages]:
            flows = self.mask_info_flow and features
            features.append(head.trunk(x, features[-1] if flows else None))
        return features

    def mask_logits(self, x: Tensor, stage: int) -> Tensor:
        head = self.mask_head[stage]
        if not self.mask_info_flow:
            return head.layers(x)
        return head.output(self._mask_features(x, stage + 1)[-1])

    def mask_probabilities(self, x: Tensor, classes: Tensor, stages: int) -> Tensor:
        if self.mask_ensemble == "last":
            return pick_class(self.mask_logits(x, stages - 1), classes).sigmoid()
        features = self._mask_features(x, stages)
        masks = [
            pick_class(head.output(f), classes).sigmoid()
            for head, f in zip(self.mask_head, features)
        ]
        return sum(masks) / len(masks)
