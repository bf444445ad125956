"""Detectors of one image written with tensors alone, so that they can be exported.

detectron2's own code asks for numbers on the way (are there boxes? how many?), which a program that
shall run on any image cannot. A form has the modules of a detector and does the same with them, box
by box of the same order. Forms of schemes are registered by the class of their region heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2ext.export.proposals import propose
from d2ext.export.structures import OUTPUTS, Detections, Inputs


class ExportForm(nn.Module):
    """A detector of one image.

    Attributes:
        drawing: the rule by which masks come into the image, see `d2ext.export.drawing`.
        mask_threshold: values of the drawn masks from here on belong to the object.
        stages: number of results that `detect` gives.
    """

    drawing = "detectron2"
    mask_threshold = 0.5
    stages = 1

    def __init__(self, model: nn.Module, all_stages: bool = False):
        """
        Args:
            model: in evaluation mode, on the CPU.
            all_stages: also give the results after each stage of a cascade.

        Raises:
            UserError: something in the model has no form.
        """
        super().__init__()
        self.model = model
        self.all_stages = all_stages
        self.check()

    @property
    def divisor(self) -> int:
        """Sides of the input are multiples of it."""
        return max(self.model.backbone.size_divisibility, 1)

    def check(self) -> None:
        """Refuse what cannot be exported."""

    def detect(
        self, features: dict[str, Tensor], boxes: Tensor, inputs: Inputs
    ) -> list[Detections]:
        """What is found, after each stage.

        Args:
            features: name -> 1 x C x h x w.
            boxes: (R, 4) proposals.
        """
        raise NotImplementedError

    def propose(self, features: dict[str, Tensor], inputs: Inputs) -> Tensor:
        """Boxes (R, 4) of the region proposal network."""
        return propose(self.model.proposal_generator, features, inputs)

    def head_features(self, features: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
        """Feature maps for the region heads."""
        return features

    def prepare(self, image: Tensor, size: Tensor, output_size: Tensor) -> Inputs:
        """Arguments as for `forward`."""
        image = (image - self.model.pixel_mean) / self.model.pixel_std
        rows, columns = (torch.arange(n, device=image.device) for n in image.shape[1:])
        inside = (rows < size[0])[:, None] & (columns < size[1])
        # As detectron2 pads: with zeros, after the normalisation.
        image = torch.where(inside, image, torch.zeros_like(image))
        return Inputs(image[None], size, output_size)

    def forward(self, image: Tensor, size: Tensor, output_size: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: 3 x H x W float32, values 0..255 in the channel order of the model, resized; H
                and W are multiples of `divisor`.
            size: (2,) int64, height and width of the picture in it, which is padded to the right
                and at the bottom with anything.
            output_size: (2,) int64, height and width of the image that the results are for.

        Returns:
            `Detections` of the whole network; with `all_stages` then those after the first stage,
            the second, and so on, without the last.
        """
        inputs = self.prepare(image, size, output_size)
        features = self.model.backbone(inputs.images)
        boxes = self.propose(features, inputs)
        outputs = self.detect(self.head_features(features, inputs), boxes, inputs)
        outputs = [outputs[-1], *(outputs[:-1] if self.all_stages else [])]
        return tuple(x for output in outputs for x in output)

    def output_names(self) -> list[str]:
        """Of what `forward` returns: `boxes`, ..., and `boxes_stage1`, ..."""
        names = list(OUTPUTS)
        if self.all_stages:
            names += [f"{n}_stage{i}" for i in range(1, self.stages) for n in OUTPUTS]
        return names


# Class of region heads -> form of the detectors that have them.
FORMS: dict[type, type[ExportForm]] = {}


def register_form(*heads: type) -> Callable[[type[ExportForm]], type[ExportForm]]:
    """Decorator: the form of detectors with region heads of these classes, or subclasses that have
    none of their own."""

    def register(form: type[ExportForm]) -> type[ExportForm]:
        FORMS.update(dict.fromkeys(heads, form))
        return form

    return register
