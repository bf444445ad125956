"""The detector of Multi-task Network Cascades: five stages trained end to end, and voting."""

from torch import Tensor, nn

from d2ext.modeling import ReproducibleRCNN
from d2ext.modeling.regions.losses import connect_features
from d2ext.modeling.rpn.caffe import AnchorPredictions
from d2ext.projects.mnc.gradient_limit import loss_scale_probes, with_probes
from d2ext.projects.mnc.roi_heads import category_feature
from d2ext.projects.mnc.voting import InstanceVoting

from detectron2.config import configurable
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances


@META_ARCH_REGISTRY.register()
class MultitaskNetworkCascade(ReproducibleRCNN):
    """Multi-task Network Cascades (Dai, He, Sun, CVPR 2016).

    Inputs are those of GeneralizedRCNN, with masks in training. The RPN and the heads are
    `DifferentiableRPN` and `MNCROIHeads`.
    """

    @configurable
    def __init__(
        self,
        *,
        voting: InstanceVoting,
        mask_backbone: nn.Module | None = None,
        category_backbone: nn.Module | None = None,
        **kwargs,
    ):
        """
        Args:
            voting: makes instances of the candidates of an image.
            mask_backbone, category_backbone: backbones of their own for stages 2 and 3 (4 and 5),
                for comparison; None for one that all stages share. They start from the weights of
                `backbone` where a checkpoint has none for them.
            kwargs: arguments of detectron2's GeneralizedRCNN.
        """
        super().__init__(**kwargs)
        self.voting = voting
        self.mask_backbone = mask_backbone
        self.category_backbone = category_backbone
        self._register_load_state_dict_pre_hook(self._share_loaded_weights)

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        ret["voting"] = InstanceVoting(cfg)
        if not cfg.MODEL.MNC.SHARED_FEATURES:
            ret["mask_backbone"] = build_backbone(cfg)
            ret["category_backbone"] = build_backbone(cfg)
        return ret

    def _share_loaded_weights(self, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        own = f"{prefix}backbone."
        source = {k[len(own) :]: v for k, v in state_dict.items() if k.startswith(own)}
        for name in ("mask_backbone", "category_backbone"):
            target = f"{prefix}{name}."
            if getattr(self, name) is None or any(k.startswith(target) for k in state_dict):
                continue
            state_dict.update({target + key: value for key, value in source.items()})

    def head_features(self, images: ImageList, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class, unless features are not shared."""
        if self.mask_backbone is None:
            return features
        late = self.category_backbone(images.tensor)
        return {
            **self.mask_backbone(images.tensor),
            **{category_feature(name): x for name, x in late.items()},
        }

    def training_step(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[Instances],
        batched_inputs: list[dict],
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        with loss_scale_probes() as probes:
            predictions, proposals = self._predict_and_propose(images, features, batched_inputs)
            # The RPN learns from the samples, too, so they are drawn before its losses.
            samples = self.roi_heads.sample(proposals, targets)
            losses = self.proposal_generator.losses_with_samples(predictions, targets, samples)
            late = self.head_features(images, features)
            losses.update(self.roi_heads.losses(late, samples, targets))
        losses = with_probes(losses, probes)
        drawn = [
            Instances(s.image_size, proposal_boxes=Boxes(s.proposal_boxes.tensor.detach()))
            for s in samples
        ]
        return drawn, connect_features(losses, [*features.values(), *late.values()])

    def propose(self, images, features, batched_inputs, targets=None):
        return self._predict_and_propose(images, features, batched_inputs)[1], {}

    def _predict_and_propose(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[dict]
    ) -> tuple[AnchorPredictions, list[Instances]]:
        # Pixels of the network input per pixel of each original image.
        scales = [
            min(size[0] / x.get("height", size[0]), size[1] / x.get("width", size[1]))
            for x, size in zip(batched_inputs, images.image_sizes)
        ]
        rpn = self.proposal_generator
        predictions = rpn.predict_anchors(features)
        return predictions, rpn.propose(predictions, images.image_sizes, scales)

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):
        """As in GeneralizedRCNN; without post-processing, the candidates for voting (see
        `MNCROIHeads`).

        Raises:
            NotImplementedError: with `detected_instances`; the masks of the cascade belong to its
                own boxes.
        """
        if detected_instances is not None:
            raise NotImplementedError("Multi-task Network Cascades predict their own boxes only.")
        stages, image_sizes = self.predict_stages(batched_inputs)
        if not do_postprocess:
            return stages[-1]
        return self._postprocess(stages[-1], batched_inputs, image_sizes)

    def _postprocess(
        self,
        instances: list[Instances],
        batched_inputs: list[dict],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict]:
        results = []
        for candidates, x, size in zip(instances, batched_inputs, image_sizes):
            image_size = (x.get("height", size[0]), x.get("width", size[1]))
            results.append({"instances": self.voting(candidates, image_size)})
        return results
