"""The detector of this collection: detectron2's Generalized R-CNN with reproducible sampling and
padding, results of every stage, and one step of a training that schemes override."""

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.parts import padded_size
from d2ext.modeling.regions.sampling import image_seeds

from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage


@META_ARCH_REGISTRY.register()
class ReproducibleRCNN(GeneralizedRCNN):
    """detectron2's GeneralizedRCNN whose training depends on seeds of the images.

    Anchors and regions are sampled from the `sample_seed` of each image where the inputs have
    one. Ground truth whose box has no area is left out, as detectron2's mapper does. Parameters and
    outputs are those of GeneralizedRCNN. `inference_stages` needs region heads with
    `predict_stages`, such as `MultiStageROIHeads`.
    """

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As in GeneralizedRCNN; in training all processes, and all parts of a batch, pad to one
        size, that of the largest image, so that a result does not depend on how a batch is split
        up."""
        images = super().preprocess_image(batched_inputs)
        if not self.training:
            return images
        height, width = images.tensor.shape[-2:]
        size = padded_size(height, width, self.backbone.size_divisibility)
        if comm.get_world_size() > 1:
            largest = torch.tensor(size, device=images.tensor.device)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            size = tuple(largest.tolist())
        if size == (height, width):
            return images
        bottom, right = size[0] - height, size[1] - width
        return ImageList(F.pad(images.tensor, (0, right, 0, bottom)), images.image_sizes)

    def forward(self, batched_inputs: list[dict]):
        """As in GeneralizedRCNN: dict of losses in training, list of results otherwise."""
        if not self.training:
            return self.inference(batched_inputs)
        with image_seeds(batched_inputs):
            images = self.preprocess_image(batched_inputs)
            features = self.backbone(images.tensor)
            targets = _with_area([x["instances"] for x in batched_inputs])
            targets = [t.to(self.device) for t in targets]
            regions, losses = self.training_step(images, features, targets, batched_inputs)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, regions)
        return losses

    def training_step(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[Instances],
        batched_inputs: list[dict],
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Regions to draw, per image with `proposal_boxes`, and the losses of a batch."""
        proposals, rpn_losses = self.propose(images, features, batched_inputs, targets)
        _, losses = self.roi_heads(images, features, proposals, targets)
        return proposals, {**losses, **rpn_losses}

    def propose(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        batched_inputs: list[dict],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Proposals of each image, of the network or of the inputs, and losses in training."""
        if self.proposal_generator is not None:
            return self.proposal_generator(images, features, targets)
        return [x["proposals"].to(self.device) for x in batched_inputs], {}

    @torch.no_grad()
    def inference_stages(self, batched_inputs: list[dict]) -> list[list[dict]]:
        """Results as if the network ended after its first, second, ..., last stage.

        Args:
            batched_inputs: as for `forward`; the model must be in evaluation mode.

        Returns:
            one entry per stage, each what `forward` returns: post-processed
            `Instances` under "instances", in pixels of the output image. The last entry equals
            the result of `forward`.
        """
        assert not self.training, "inference_stages() needs model.eval()"
        stages, image_sizes = self.predict_stages(batched_inputs)
        return [self._postprocess(x, batched_inputs, image_sizes) for x in stages]

    def predict_stages(
        self, batched_inputs: list[dict]
    ) -> tuple[list[list[Instances]], list[tuple[int, int]]]:
        """What the region heads give after each stage, in pixels of the network input, and the
        (height, width) of each image without padding."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.propose(images, features, batched_inputs)
        features = self.head_features(images, features)
        return self.roi_heads.predict_stages(features, proposals), images.image_sizes

    def head_features(self, images: ImageList, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Feature maps for the region heads: those of the RPN, unless a scheme has others."""
        return features


def _with_area(targets: list[Instances]) -> list[Instances]:
    kept = Boxes.cat([t.gt_boxes for t in targets]).nonempty(threshold=1e-5)
    if kept.all():
        return targets
    return [t[k] for t, k in zip(targets, kept.split([len(t) for t in targets]))]
