"""ImageNet ResNets as backbones: torchvision's and MMDetection's `.pth`, the `.caffemodel` of
MSRA (He et al., CVPR 2016) and its conversions for MXNet (`.params`)."""

from torch import Tensor, nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.importers.common import (
    MSRA_PIXELS,
    TORCHVISION_PIXELS,
    pixel_settings,
    stride_settings,
)
from d2ext.checkpoint.mapping import Rule
from d2ext.checkpoint.registry import Importer, register_importer
from d2ext.modeling.backbone.resnet_caffe import CaffeStem

_PREFIX = "backbone.{pre:*}"  # "bottom_up." in a pyramid
_CLASSIFIER = "classifier of ImageNet"


def torch_resnet_rules(target: str = _PREFIX, source: str = "") -> list[Rule]:
    """detectron2's ResNet names <- those of torchvision, ResNeXt and deformable ones included."""
    block, other = f"{target}res{{s}}.{{j}}.", f"{source}layer{{s-1}}.{{j}}."
    return [
        Rule(f"{target}stem.conv1.weight", f"{source}conv1.weight"),
        Rule(f"{target}stem.conv1.norm.{{p:w}}", f"{source}bn1.{{p}}"),
        Rule(f"{block}conv{{i}}.weight", f"{other}conv{{i}}.weight"),
        Rule(f"{block}conv{{i}}.norm.{{p:w}}", f"{other}bn{{i}}.{{p}}"),
        Rule(f"{block}shortcut.weight", f"{other}downsample.0.weight"),
        Rule(f"{block}shortcut.norm.{{p:w}}", f"{other}downsample.1.{{p}}"),
        Rule(
            f"{block}conv2_offset.{{p:w}}",
            [f"{other}conv2.conv_offset.{{p}}", f"{other}conv2_offset.{{p}}"],
        ),
    ]


def _branches() -> list[tuple]:
    """(layer of a detectron2 block, alternative names of it in Caffe without the word before)."""
    return [
        ("conv{i}", ["{s}{j:letter}_branch2{i:abc}", "{s}{j:count}_branch2{i:abc}"]),
        ("shortcut", ["{s}{j:letter}_branch1", "{s}{j:count}_branch1"]),
    ]


def mxnet_resnet_rules(target: str = _PREFIX) -> list[Rule]:
    """detectron2's ResNet names <- Caffe's as MXNet's conversions spell them."""
    parts = {"weight": "gamma", "bias": "beta"}
    parts.update(running_mean="moving_mean", running_var="moving_var")
    rules = [Rule(f"{target}stem.conv1.weight", "conv1_weight")]
    rules += [Rule(f"{target}stem.conv1.norm.{k}", f"bn_conv1_{v}") for k, v in parts.items()]
    for layer, names in _branches():
        ours = f"{target}res{{s}}.{{j}}.{layer}"
        rules.append(Rule(f"{ours}.weight", [f"res{x}_weight" for x in names]))
        for k, v in parts.items():
            rules.append(Rule(f"{ours}.norm.{k}", [f"bn{x}_{v}" for x in names]))
    return rules


def _caffe_statistics(value: Tensor, scale: Tensor | None) -> Tensor:
    """Caffe keeps sums and, in a third blob, what to divide them by."""
    if scale is None or scale.numel() != 1:
        return value
    return value / scale if scale != 0 else value * 0


def _caffe_mean(value: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The mean, less the bias of the convolution before (ResNet-50 has one in conv1)."""
    mean = _caffe_statistics(value, scale)
    return mean if bias is None else mean - bias


def caffe_resnet_rules(target: str = _PREFIX) -> list[Rule]:
    """detectron2's ResNet names <- Caffe's layers, with batch norm in two of them."""
    layers = [("stem.conv1", ["conv1"], ["bn_conv1"], ["scale_conv1"])]
    for layer, names in _branches():
        parts = [[f"{word}{x}" for x in names] for word in ("res", "bn", "scale")]
        layers.append((f"res{{s}}.{{j}}.{layer}", *parts))
    rules = []
    for ours, convs, norms, scales in layers:
        ours = target + ours
        means = [(f"{n}.0", f"{n}.2?", f"{c}.1?") for n, c in zip(norms, convs)]
        variances = [(f"{n}.1", f"{n}.2?") for n in norms]
        rules += [
            Rule(f"{ours}.weight", [f"{x}.0" for x in convs]),
            Rule(f"{ours}.norm.weight", [f"{x}.0" for x in scales]),
            Rule(f"{ours}.norm.bias", [f"{x}.1" for x in scales]),
            Rule(f"{ours}.norm.running_mean", means, _caffe_mean, label="divided by its scale"),
            Rule(
                f"{ours}.norm.running_var",
                variances,
                _caffe_statistics,
                label="divided by its scale",
            ),
        ]
    return rules


def strip_prefixes(*prefixes: str):
    """A function that removes the first of the prefixes from every name that has one."""

    def prepare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, value in weights.items():
            found = [x for x in prefixes if name.startswith(x)]
            result[name[len(found[0]) :] if found else name] = value
        return result

    return prepare


def _torch_settings(file: CheckpointFile, model: nn.Module) -> dict:
    return {**pixel_settings(model, *TORCHVISION_PIXELS), **stride_settings(model, in_1x1=False)}


def _caffe_settings(file: CheckpointFile, model: nn.Module) -> dict:
    return {**pixel_settings(model, *MSRA_PIXELS), **stride_settings(model, in_1x1=True)}


def _mxnet_settings(file: CheckpointFile, model: nn.Module) -> dict:
    settings = _caffe_settings(file, model)
    settings.update(pixel_settings(model, "RGB", (123.15, 115.9, 103.06), (1.0, 1.0, 1.0)))
    return settings


def caffe_stem(model: nn.Module) -> bool:
    """Whether the stem of a model pools as in Caffe; other backbones have no choice."""
    return any(isinstance(module, CaffeStem) for module in model.modules())


def _torch_notes(file: CheckpointFile, model: nn.Module) -> list[str]:
    if not caffe_stem(model):
        return []
    return ["the stem pools without padding; MODEL.CAFFE_RESNET.CEIL_POOL False is torchvision's"]


register_importer(
    Importer(
        name="torchvision-resnet",
        title="ResNet of torchvision",
        rules=lambda model: torch_resnet_rules(),
        unused=[(r".*\.num_batches_tracked", "a counter"), (r"fc\..*", _CLASSIFIER)],
        partial=True,
        prepare=strip_prefixes("module."),
        settings=_torch_settings,
        notes=_torch_notes,
    )
)
register_importer(
    Importer(
        name="caffe-resnet",
        title="ResNet of Caffe",
        rules=lambda model: caffe_resnet_rules(),
        unused=[(r"fc1000\.[01]", _CLASSIFIER)],
        partial=True,
        settings=_caffe_settings,
    )
)
register_importer(
    Importer(
        name="mxnet-resnet",
        title="ResNet of MXNet",
        rules=lambda model: mxnet_resnet_rules(),
        unused=[(r"fc1(000)?_(weight|bias)", _CLASSIFIER)],
        partial=True,
        prepare=strip_prefixes("arg:", "aux:"),
        settings=_mxnet_settings,
    )
)
