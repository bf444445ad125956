"""ImageNet VGG-16 as a backbone: torchvision's `.pth` and the authors' `.caffemodel`."""

from torch import nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.importers.common import TORCHVISION_PIXELS, pixel_settings
from d2ext.checkpoint.importers.resnet import strip_prefixes
from d2ext.checkpoint.mapping import Rule
from d2ext.checkpoint.registry import Importer, register_importer
from d2ext.checkpoint.settings import INPUT_FORMAT

# Positions of conv{i}_{j} among torchvision's ``features``.
_FEATURES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
_REST = "fully connected layers of ImageNet"


def torch_vgg_rules() -> list[Rule]:
    """`backbone.conv{i}_{j}` <- `features.{n}`."""
    return [
        Rule(f"backbone.conv{i}_{j}.{{p:w}}", f"features.{n}.{{p}}")
        for i, positions in _FEATURES.items()
        for j, n in enumerate(positions, start=1)
    ]


def caffe_vgg_rules() -> list[Rule]:
    """`backbone.conv{i}_{j}` <- the layers of the same names."""
    return [
        Rule("backbone.conv{i}_{j}.weight", "conv{i}_{j}.0"),
        Rule("backbone.conv{i}_{j}.bias", "conv{i}_{j}.1"),
    ]


def torch_vgg_settings(file: CheckpointFile, model: nn.Module) -> dict:
    """torchvision's pixels."""
    return pixel_settings(model, *TORCHVISION_PIXELS)


def caffe_vgg_settings(file: CheckpointFile, model: nn.Module) -> dict:
    """BGR pixels without division; the mean differs between networks that start from this one."""
    settings = pixel_settings(model, "BGR", (), (1.0, 1.0, 1.0))
    return {k: v for k, v in settings.items() if k in (INPUT_FORMAT, "pixel_std")}


register_importer(
    Importer(
        name="torchvision-vgg16",
        title="VGG-16 of torchvision",
        rules=lambda model: torch_vgg_rules(),
        unused=[(r"classifier\.\d\..*", _REST)],
        partial=True,
        prepare=strip_prefixes("module."),
        settings=torch_vgg_settings,
    )
)
register_importer(
    Importer(
        name="caffe-vgg16",
        title="VGG-16 of Caffe",
        rules=lambda model: caffe_vgg_rules(),
        unused=[(r"fc[678](_mask)?\.[01]", _REST)],
        partial=True,
        settings=caffe_vgg_settings,
    )
)
