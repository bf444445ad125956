"""The detector around multi-stage region heads: reproducible sampling and padding, and per-stage
results."""

from typing import Dict, List

import torch
from torch.nn import functional as F

from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList
from detectron2.utils import comm

from .sampling import image_seeds

__all__ = ["MultiStageRCNN"]


@META_ARCH_REGISTRY.register()
class MultiStageRCNN(GeneralizedRCNN):
    """detectron2's GeneralizedRCNN for :class:`MultiStageROIHeads` and its subclasses.

    In training, anchors and regions are sampled from the ``sample_seed`` of each image where the
    inputs have one. Parameters and outputs are those of GeneralizedRCNN.
    """

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """As in GeneralizedRCNN; in training all processes pad to one size, that of the largest
        image among them, so that a result does not depend on how a batch is split up."""
        images = super().preprocess_image(batched_inputs)
        if not self.training or comm.get_world_size() == 1:
            return images
        height, width = images.tensor.shape[-2:]
        largest = torch.tensor([height, width], device=images.tensor.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        bottom, right = (largest - largest.new_tensor([height, width])).tolist()
        return ImageList(F.pad(images.tensor, (0, right, 0, bottom)), images.image_sizes)

    def forward(self, batched_inputs: List[Dict]):
        """As in GeneralizedRCNN: dict of losses in training, list of results otherwise."""
        with image_seeds(batched_inputs):
            return super().forward(batched_inputs)

    @torch.no_grad()
    def inference_stages(self, batched_inputs: List[Dict]) -> List[List[Dict]]:
        """Results as if the cascade ended after its first, second, ..., last stage.

        Args:
            batched_inputs: as for :meth:`forward`; the model must be in evaluation mode.

        Returns:
            list[list[dict]]: one entry per stage, each what :meth:`forward` returns: post-processed
            ``Instances`` under "instances", in pixels of the output image. The last entry equals
            the result of :meth:`forward`.
        """
        assert not self.training, "inference_stages() needs model.eval()"
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        stages = self.roi_heads.predict_stages(features, proposals)
        return [self._postprocess(x, batched_inputs, images.image_sizes) for x in stages]
