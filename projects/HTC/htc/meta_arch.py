"""The detector of Hybrid Task Cascade: a Generalized R-CNN that also takes semantic label maps."""

from typing import Dict, List

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling import MultiStageRCNN

from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import ImageList

__all__ = ["HybridTaskCascade"]


@META_ARCH_REGISTRY.register()
class HybridTaskCascade(MultiStageRCNN):
    """Hybrid Task Cascade (Chen et al., CVPR 2019).

    Inputs are those of GeneralizedRCNN. In training with a semantic branch each image also needs
    ``sem_seg``: (H, W) int64 labels at the resolution of the network input.
    """

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """As in the base class; in training the result carries ``sem_seg``, the label maps padded
        like the images (N x H x W), where the model has a semantic branch."""
        images = super().preprocess_image(batched_inputs)
        head = self.roi_heads.semantic_head
        if self.training and head is not None:
            images.sem_seg = self._semantic_targets(batched_inputs, images, head.ignore_label)
        return images

    def _semantic_targets(
        self, batched_inputs: List[Dict], images: ImageList, ignore_label: int
    ) -> Tensor:
        for x, size in zip(batched_inputs, images.image_sizes):
            if "sem_seg" not in x:
                raise UserError(
                    f"No 'sem_seg' for image {x.get('file_name', x.get('image_id', '?'))}: build "
                    "the mapper with semantic='auto' (INPUT.SEMANTIC in yaml configs), or set "
                    "MODEL.HTC.SEMANTIC.ENABLED False."
                )
            if tuple(x["sem_seg"].shape) != tuple(size):
                raise UserError(
                    f"'sem_seg' of image {x.get('file_name', x.get('image_id', '?'))} is "
                    f"{tuple(x['sem_seg'].shape)}, the image {tuple(size)}: transform both alike."
                )
        height, width = images.tensor.shape[-2:]
        maps = [x["sem_seg"].to(self.device, torch.int64) for x in batched_inputs]
        return torch.stack(
            [
                F.pad(x, (0, width - x.shape[1], 0, height - x.shape[0]), value=ignore_label)
                for x in maps
            ]
        )
