"""Settings that several importers share."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from d2ext.checkpoint.settings import INPUT_FORMAT
from d2ext.modeling import RoundedAnchorGenerator

from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock

# torchvision's statistics, for pixels of 0 to 255 in RGB order.
TORCHVISION_PIXELS = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# Mean of ImageNet in BGR order, as detectron2 uses it with the ResNets of MSRA.
MSRA_PIXELS = ("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


def pixel_settings(
    model: nn.Module, order: str, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Channel order and pixel statistics, for models that have them."""
    if not hasattr(model, "pixel_mean"):
        return {}
    return {INPUT_FORMAT: order, "pixel_mean": list(mean), "pixel_std": list(std)}


def stride_settings(model: nn.Module, in_1x1: bool) -> dict[str, list[int]]:
    """Strides of all bottleneck blocks: in the first 1x1 convolution (the ResNets of MSRA) or in
    the 3x3 convolution (torchvision)."""
    settings = {}
    for name, block in _bottlenecks(model):
        stride = _first(block.conv1.stride) * _first(block.conv2.stride)
        if stride == 1:
            continue
        inner = 1 if in_1x1 else stride
        settings[f"{name}.conv1.stride"] = [stride // inner] * 2
        for layer in ("conv2", "conv2_offset"):
            if hasattr(block, layer):
                settings[f"{name}.{layer}.stride"] = [inner] * 2
    return settings


def strides_in_1x1(model: nn.Module) -> bool:
    """Whether a bottleneck block has its stride in the first 1x1 convolution."""
    return any(_first(block.conv1.stride) > 1 for _, block in _bottlenecks(model))


def _bottlenecks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (BottleneckBlock, DeformBottleneckBlock)):
            yield name, module


def one_logit(x: Tensor) -> Tensor:
    """Scores of the background, then of the foreground, of all anchors -> one logit per anchor: the
    sigmoid of the difference is the softmax of both."""
    background, foreground = x.chunk(2)
    return foreground - background


def anchor_notes(model: nn.Module) -> list[str]:
    """A line if the anchors are not those of Faster R-CNN's Caffe release."""
    if isinstance(model.proposal_generator.anchor_generator, RoundedAnchorGenerator):
        return []
    return [
        "the release rounds its anchors: set MODEL.ANCHOR_GENERATOR.NAME RoundedAnchorGenerator "
        "and OFFSET 0.5"
    ]


def _first(value) -> int:
    return value[0] if isinstance(value, (tuple, list)) else value
