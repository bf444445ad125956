"""The detector of Multi-task Network Cascades: five stages trained end to end, and voting."""

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from d2ext.modeling import MultiStageRCNN, image_seeds
from d2ext.modeling.losses import connect_features

from detectron2.config import configurable
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from .building import category_feature
from .voting import InstanceVoting

__all__ = ["MultitaskNetworkCascade"]


@META_ARCH_REGISTRY.register()
class MultitaskNetworkCascade(MultiStageRCNN):
    """Multi-task Network Cascades (Dai, He, Sun, CVPR 2016).

    Inputs are those of GeneralizedRCNN, with masks in training. The RPN and the heads are
    :class:`DifferentiableRPN` and :class:`MNCROIHeads`.
    """

    @configurable
    def __init__(
        self,
        *,
        voting: InstanceVoting,
        mask_backbone: Optional[nn.Module] = None,
        category_backbone: Optional[nn.Module] = None,
        **kwargs,
    ):
        """
        Args:
            voting: makes instances of the candidates of an image.
            mask_backbone, category_backbone: backbones of their own for stages 2 and 3 (4 and 5),
                for comparison; None for one that all stages share. They start from the weights of
                ``backbone`` where a checkpoint has none for them.
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

    def _share_loaded_weights(self, state_dict: Dict[str, Tensor], prefix: str, *_) -> None:
        own = f"{prefix}backbone."
        source = {k[len(own) :]: v for k, v in state_dict.items() if k.startswith(own)}
        for name in ("mask_backbone", "category_backbone"):
            target = f"{prefix}{name}."
            if getattr(self, name) is None or any(k.startswith(target) for k in state_dict):
                continue
            state_dict.update({target + key: value for key, value in source.items()})

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """As in the base class; the result carries ``scales``, pixels of the network input per
        pixel of the original image."""
        images = super().preprocess_image(batched_inputs)
        images.scales = [
            min(size[0] / x.get("height", size[0]), size[1] / x.get("width", size[1]))
            for x, size in zip(batched_inputs, images.image_sizes)
        ]
        return images

    def head_features(self, images: ImageList, features: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Feature maps for the region heads: those of the RPN, unless features are not shared."""
        if self.mask_backbone is None:
            return features
        late = self.category_backbone(images.tensor)
        return {
            **self.mask_backbone(images.tensor),
            **{category_feature(name): x for name, x in late.items()},
        }

    def forward(self, batched_inputs: List[Dict]):
        """As in GeneralizedRCNN: dict of losses in training, list of results otherwise."""
        if not self.training:
            return super().forward(batched_inputs)
        with image_seeds(batched_inputs):
            images = self.preprocess_image(batched_inputs)
            targets = [x["instances"].to(self.device) for x in batched_inputs]
            features = self.backbone(images.tensor)
            # The RPN learns from the samples, too, so they are drawn before its losses.
            samples, losses = self.proposal_generator(
                images, features, targets, sample=self.roi_heads.sample
            )
            late = self.head_features(images, features)
            losses.update(self.roi_heads(images, late, samples, targets)[1])
            losses = connect_features(losses, [*features.values(), *late.values()])
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            drawn = [Boxes(s.proposal_boxes.tensor.detach()) for s in samples]
            self.visualize_training(
                batched_inputs,
                [Instances(s.image_size, proposal_boxes=b) for s, b in zip(samples, drawn)],
            )
        return losses

    def inference(
        self,
        batched_inputs: List[Dict],
        detected_instances: Optional[List[Instances]] = None,
        do_postprocess: bool = True,
    ):
        """As in GeneralizedRCNN; without post-processing, the candidates for voting (see
        :class:`MNCROIHeads`).

        Raises:
            NotImplementedError: with ``detected_instances``; the masks of the cascade belong to its
                own boxes.
        """
        if detected_instances is not None:
            raise NotImplementedError("Multi-task Network Cascades predict their own boxes only.")
        results, images = self._candidates(batched_inputs)
        if not do_postprocess:
            return results[-1]
        return self._postprocess(results[-1], batched_inputs, images.image_sizes)

    @torch.no_grad()
    def inference_stages(self, batched_inputs: List[Dict]) -> List[List[Dict]]:
        """Results as if the network ended after stage 3 and, with five stages, after stage 5.

        Args:
            batched_inputs: as for :meth:`forward`; the model must be in evaluation mode.

        Returns:
            list[list[dict]]: per number of stages what :meth:`forward` returns.
        """
        assert not self.training, "inference_stages() needs model.eval()"
        results, images = self._candidates(batched_inputs)
        return [self._postprocess(x, batched_inputs, images.image_sizes) for x in results]

    def _candidates(self, batched_inputs: List[Dict]) -> Tuple[List[List[Instances]], ImageList]:
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        features = self.head_features(images, features)
        return self.roi_heads.predict_stages(features, proposals), images

    def _postprocess(
        self,
        instances: List[Instances],
        batched_inputs: List[Dict],
        image_sizes: List[Tuple[int, int]],
    ) -> List[Dict]:
        results = []
        for candidates, x, size in zip(instances, batched_inputs, image_sizes):
            image_size = (x.get("height", size[0]), x.get("width", size[1]))
            results.append({"instances": self.voting(candidates, image_size)})
        return results
