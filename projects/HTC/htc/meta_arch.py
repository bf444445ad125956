"""The detector of Hybrid Task Cascade: a Generalized R-CNN that also takes semantic label maps."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling import ReproducibleRCNN

from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances


@META_ARCH_REGISTRY.register()
class HybridTaskCascade(ReproducibleRCNN):
    """Hybrid Task Cascade (Chen et al., CVPR 2019).

    Inputs are those of GeneralizedRCNN. In training with a semantic branch each image also needs
    `sem_seg`: (H, W) integer labels at the resolution of the network input.
    """

    def training_step(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[Instances],
        batched_inputs: list[dict],
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        labels = None
        if self.roi_heads.semantic_head is not None:
            labels = self.semantic_labels(images, batched_inputs)
        proposals, rpn_losses = self.propose(images, features, batched_inputs, targets)
        _, losses = self.roi_heads(images, features, proposals, targets, labels)
        return proposals, {**losses, **rpn_losses}

    def semantic_labels(self, images: ImageList, batched_inputs: list[dict]) -> Tensor:
        """The label maps of a batch, padded like the images: N x H x W, int64.

        Raises:
            UserError: a map is missing, or of another size than its image.
        """
        ignore_label = self.roi_heads.semantic_head.ignore_label
        for x, size in zip(batched_inputs, images.image_sizes):
            if "sem_seg" not in x:
                raise UserError(
                    f"no 'sem_seg' for image {x.get('file_name', x.get('image_id', '?'))}: build "
                    "the mapper with semantic='auto' (INPUT.SEMANTIC in yaml configs), or set "
                    "MODEL.HTC.SEMANTIC.ENABLED False"
                )
            if tuple(x["sem_seg"].shape) != tuple(size):
                raise UserError(
                    f"'sem_seg' of image {x.get('file_name', x.get('image_id', '?'))} is "
                    f"{tuple(x['sem_seg'].shape)}, the image {tuple(size)}: transform both alike"
                )
        height, width = images.tensor.shape[-2:]
        maps = [x["sem_seg"].to(self.device, torch.int64) for x in batched_inputs]
        return torch.stack(
            [
                F.pad(x, (0, width - x.shape[1], 0, height - x.shape[0]), value=ignore_label)
                for x in maps
            ]
        )
