"""Predictions of a file that `d2ext export` wrote, by onnxruntime."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2ext.config import load_projects
from d2ext.engine.predictor import Predictor
from d2ext.errors import UserError
from d2ext.export.drawing import draw_masks
from d2ext.export.programs import import_optional
from d2ext.export.settings import FileSettings
from d2ext.export.structures import OUTPUTS
from d2ext.inference import Preparation

from detectron2.data import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes, Instances


class OnnxModel(nn.Module):
    """A session of onnxruntime with the call of a detector of detectron2.

    Attributes:
        settings: what the file says about itself.
        session: onnxruntime's.
        num_parameters: of the network that was exported.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
            UserError: onnxruntime is missing, or the file is missing, damaged or of others.
        """
        super().__init__()
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist; d2ext export writes such files")
        (runtime,) = import_optional("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own, which have no common class
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} cannot be read by onnxruntime: {reason}") from error
        texts = self.session.get_modelmeta().custom_metadata_map
        self.settings = FileSettings.from_texts(texts, path)
        self.num_parameters = self.settings.parameters
        if self.settings.stages > 1:
            self.inference_stages = self._inference_stages

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Per image `{"instances": Instances}`; inputs as for detectron2's GeneralizedRCNN."""
        return [{"instances": self._run(x, list(OUTPUTS))[0]} for x in batched_inputs]

    def _inference_stages(self, batched_inputs: list[dict]) -> list[list[dict]]:
        """See `d2ext.modeling.ReproducibleRCNN.inference_stages`."""
        names = [x.name for x in self.session.get_outputs()]
        found = [self._run(x, names) for x in batched_inputs]
        order = [*range(1, self.settings.stages), 0]  # the last stage comes first in the file
        return [[{"instances": own[i]} for own in found] for i in order]

    def _run(self, inputs: dict[str, Any], names: list[str]) -> list[Instances]:
        image = inputs["image"].to(torch.float32).contiguous()
        size = (
            int(inputs.get("height", image.shape[1])),
            int(inputs.get("width", image.shape[2])),
        )
        output_size = torch.tensor(size, dtype=torch.int64)
        values = self.session.run(
            names, {"image": image.numpy(), "output_size": output_size.numpy()}
        )
        found = [torch.from_numpy(x) for x in values]
        step = len(OUTPUTS)
        return [self._instances(found[i : i + step], size) for i in range(0, len(found), step)]

    def _instances(self, found: list[Tensor], size: tuple[int, int]) -> Instances:
        boxes, scores, classes, masks = found
        settings = self.settings
        drawn = draw_masks(settings.drawing, masks, boxes, size, settings.mask_threshold)
        return Instances(
            size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes, pred_masks=drawn
        )


class _Experiment(NamedTuple):
    """What `Predictor` asks a run for."""

    image_format: str
    device: str = "cpu"
    unread: tuple[str, ...] = ()

    def test_sets(self) -> list[str]:
        return []


class OnnxPredictor(Predictor):
    """`Predictor` with the network in a file of ONNX; no config is needed, and no checkpoint."""

    def __init__(self, path: str | os.PathLike):
        """
        Args:
            path: of a file that `d2ext export` wrote.

        Raises:
            UserError: see `OnnxModel`.
        """
        load_projects()  # they know how masks are drawn
        model = OnnxModel(path)
        settings = model.settings
        self.model = model.eval()
        self.class_names, self.weights = list(settings.class_names), os.fspath(path)
        self.metadata = Metadata(thing_classes=self.class_names)
        self.experiment: Any = _Experiment(settings.channel_order)
        resize = ResizeShortestEdge([settings.short_edge] * 2, settings.max_size)
        self.preparation = Preparation([resize], settings.channel_order)


ENGINES = ("torch", "onnxruntime")


def choose_engine(
    weights: str | os.PathLike | None, engine: str | None = None, unused: Sequence[str] = ()
) -> OnnxPredictor | None:
    """The predictor of onnxruntime, if weights are for it: files of ONNX are, and no others.

    Args:
        weights: a file.
        engine: one of `ENGINES`, if the user names it.
        unused: what the user gave for PyTorch, such as a config and overrides.

    Returns:
        None for PyTorch's.

    Raises:
        UserError: the file, the engine and the rest do not go together; see `OnnxModel`.
    """
    is_onnx = weights is not None and os.fspath(weights).endswith(".onnx")
    if engine == "onnxruntime" and not is_onnx:
        raise UserError(
            f"--engine onnxruntime needs a file of ONNX, not {weights}; d2ext export writes one"
        )
    if engine == "torch" and is_onnx:
        raise UserError(f"--engine torch cannot use {weights}; give the checkpoint")
    if weights is None or not is_onnx:
        return None
    if unused:
        raise UserError(
            f"{weights} has its settings inside, {unused[0]} has no effect on it; leave it out, or "
            "export the model with it"
        )
    return OnnxPredictor(weights)
