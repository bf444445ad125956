"""ImageNet backbones at full size: torchvision's own names and shapes, Caffe's and MXNet's from
their tables, against the models of the configs."""

import pickle

import pytest
import torch
import torchvision

from d2ext.checkpoint import Checkpointer, CheckpointFile, import_weights
from d2ext.checkpoint.importers.resnet import caffe_resnet_rules
from d2ext.checkpoint.mapping import convert_weights
from d2ext.modeling.backbone.resnet_caffe import CaffeResNet

from tests.checkpoint.helpers import Coded, meta_model

MODELS = {
    "htc": "projects/HTC/configs/htc_R_{}_FPN_20e_coco.yaml",
    "fcis": "projects/FCIS/configs/fcis_R_{}_coco.yaml",
    "mnc": "projects/MNC/configs/mnc_R_{}_C4_coco.yaml",
}


def caffe_suffixes(depth):
    numbered = [
        ["a"] + [f"b{i}" for i in range(1, n)] for n in {101: (4, 23), 152: (8, 36)}.get(depth, ())
    ]
    middle = numbered or [list("abcd"), list("abcdef")]
    return [list("abc"), *middle, list("abc")]


def caffe_layers(depth):
    """(conv, norm, scale, our layer, shape) of every convolution."""
    yield "conv1", "bn_conv1", "scale_conv1", "stem.conv1", (64, 3, 7, 7)
    inputs = 64
    for index, suffixes in enumerate(caffe_suffixes(depth)):
        mid = 64 * 2**index
        for j, suffix in enumerate(suffixes):
            branches = [
                ("branch2a", "conv1", (mid, inputs, 1, 1)),
                ("branch2b", "conv2", (mid, mid, 3, 3)),
                ("branch2c", "conv3", (4 * mid, mid, 1, 1)),
            ]
            if j == 0:
                branches.append(("branch1", "shortcut", (4 * mid, inputs, 1, 1)))
            for branch, ours, shape in branches:
                name = f"{index + 2}{suffix}_{branch}"
                yield f"res{name}", f"bn{name}", f"scale{name}", f"res{index + 2}.{j}.{ours}", shape
            inputs = 4 * mid


def backbone_names(model):
    """Parameters of the ResNet inside a model, without those of a pyramid."""
    return {
        name for name in model.state_dict() if name.startswith("backbone.") and "fpn_" not in name
    }


@pytest.mark.parametrize("project", MODELS)
@pytest.mark.parametrize("depth", [50, 101])
def test_torchvision_resnets_fill_the_backbones(project, depth):
    coded = Coded()
    with torch.device("meta"):
        source = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    for name, value in source.items():
        coded.add(f"module.{name}", *value.shape)
    model = meta_model(MODELS[project].format(depth))
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded), model)
    unused = {x.source for x in conversion.having("unused") if not x.note}
    if project == "mnc":  # its res5 is in the heads, which is detectron2's business
        assert unused and all(x.startswith("layer4.") for x in unused)
    else:
        conversion.check("x.pth")
        assert unused == set()
    assert conversion.title == "ResNet of torchvision"
    assert set(conversion.weights) == backbone_names(model)
    prefix = "backbone.bottom_up." if project == "htc" else "backbone."
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.bias": "bn1.bias",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res3.0.shortcut.norm.running_var": "layer2.0.downsample.1.running_var",
        "res4.5.conv2.weight": "layer3.5.conv2.weight",
        "res4.1.conv3.norm.running_mean": "layer3.1.bn3.running_mean",
    }
    for ours, theirs in pairs.items():
        assert conversion.weights[prefix + ours] is coded[f"module.{theirs}"]
    settings = conversion.settings
    assert settings["input_format"] == "RGB" and settings["pixel_std"] == [58.395, 57.12, 57.375]
    assert settings[f"{prefix}res3.0.conv1.stride"] == [1, 1]
    assert settings[f"{prefix}res3.0.conv2.stride"] == [2, 2]
    assert bool(conversion.notes) == (project == "fcis")  # its stem pools otherwise


def caffe_values(depth, generator, scale=2.0):
    """A small stand-in for every blob: only the number of channels is that of the real one."""
    weights, expected = {}, {}
    for conv, norm, factor, ours, shape in caffe_layers(depth):
        channels = shape[0]
        values = {
            k: torch.randn(channels, generator=generator) for k in ("mean", "var", "gamma", "beta")
        }
        weights[f"{conv}.0"] = torch.zeros(1).expand(shape)
        weights[f"{norm}.0"], weights[f"{norm}.1"] = values["mean"], values["var"]
        weights[f"{norm}.2"] = torch.tensor([scale])
        weights[f"{factor}.0"], weights[f"{factor}.1"] = values["gamma"], values["beta"]
        bias = 0
        if conv == "conv1" and depth == 50:
            bias = weights["conv1.1"] = torch.randn(channels, generator=generator)
        expected[f"{ours}.weight"] = weights[f"{conv}.0"]
        expected[f"{ours}.norm.running_mean"] = values["mean"] / scale - bias
        expected[f"{ours}.norm.running_var"] = values["var"] / scale
        expected[f"{ours}.norm.weight"] = values["gamma"]
        expected[f"{ours}.norm.bias"] = values["beta"]
    return weights, expected


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_resnets_of_msra_fill_the_backbones(depth):
    weights, expected = caffe_values(depth, torch.Generator().manual_seed(depth))
    weights["fc1000.0"], weights["fc1000.1"] = torch.zeros(1, 2048), torch.zeros(1)
    model = meta_model(f"projects/FCIS/configs/fcis_R_{depth}_coco.yaml")
    conversion = import_weights(CheckpointFile("x", "caffemodel", weights), model)
    conversion.check("x")
    assert conversion.title == "ResNet of Caffe"
    assert set(conversion.weights) == {f"backbone.{k}" for k in expected}
    for name, value in expected.items():
        torch.testing.assert_close(conversion.weights[f"backbone.{name}"], value)
    settings = conversion.settings
    assert settings["input_format"] == "BGR"
    assert settings["pixel_mean"] == [103.53, 116.28, 123.675]
    assert settings["backbone.res4.0.conv1.stride"] == [2, 2]


def test_caffes_batch_norm_and_the_imported_one_compute_the_same():
    """Two layers of Caffe, with sums for statistics and a bias before them, against ours."""
    generator = torch.Generator().manual_seed(0)
    model = CaffeResNet(depth=50, stem_out_channels=4, res2_out_channels=8, width_per_group=2)
    x = torch.randn(1, 3, 9, 9, generator=generator)
    weight, bias = torch.randn(4, 3, 7, 7, generator=generator), torch.randn(4)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    gamma, beta = torch.randn(4), torch.randn(4)
    for factor in (3.0, 0.0):
        weights = {"conv1.0": weight, "conv1.1": bias}
        weights.update({"bn_conv1.0": mean * factor, "bn_conv1.1": var * factor})
        weights.update({"bn_conv1.2": torch.tensor([factor])})
        weights.update({"scale_conv1.0": gamma, "scale_conv1.1": beta})
        names = {
            f"stem.conv1.{x}": tuple(v.shape) for x, v in model.stem.conv1.state_dict().items()
        }
        found = convert_weights(names, weights, caffe_resnet_rules("")).weights
        model.stem.conv1.load_state_dict({k[len("stem.conv1.") :]: v for k, v in found.items()})
        y = torch.nn.functional.conv2d(x, weight, bias, stride=2, padding=3)
        used_mean, used_var = (mean, var) if factor else (torch.zeros(4), torch.zeros(4))
        y = (y - used_mean[:, None, None]) / (used_var[:, None, None] + 1e-5).sqrt()
        y = y * gamma[:, None, None] + beta[:, None, None]
        torch.testing.assert_close(model.stem.conv1(x), y, rtol=1e-4, atol=1e-4)


def test_resnets_of_mxnet_fill_the_backbone_of_fcis():
    coded = Coded()
    norms = {"gamma": "arg", "beta": "arg", "moving_mean": "aux", "moving_var": "aux"}
    for conv, norm, _, _, shape in caffe_layers(101):
        coded.add(f"arg:{conv}_weight", *shape)
        for name, kind in norms.items():
            coded.add(f"{kind}:{norm}_{name}", shape[0])
    coded.add("arg:fc1_weight", 1000, 2048)
    model = meta_model("projects/FCIS/configs/fcis_R_101_coco.yaml")
    conversion = import_weights(CheckpointFile("x", "mxnet", coded), model)
    conversion.check("x")
    assert conversion.title == "ResNet of MXNet"
    assert set(conversion.weights) == backbone_names(model)
    assert conversion.settings["input_format"] == "RGB"


def test_vgg_of_caffe_fills_the_backbone_for_other_projects():
    """Without the importer of MNC, only the convolutions have a place."""
    coded = Coded()
    widths = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    inputs = 3
    for i, (width, count) in enumerate(widths, start=1):
        for j in range(1, count + 1):
            coded.add(f"conv{i}_{j}.0", width, inputs, 3, 3)
            coded.add(f"conv{i}_{j}.1", width)
            inputs = width
    for name, shape in {"fc6": (4096, 25088), "fc7": (4096, 4096), "fc8": (1000, 4096)}.items():
        coded.add(f"{name}.0", *shape)
    model = meta_model("projects/MNC/configs/mnc_vgg16_voc_sds.yaml")
    conversion = import_weights(CheckpointFile("x", "caffemodel", coded), model, project="")
    conversion.check("x")
    assert set(conversion.weights) == backbone_names(model)
    assert {x.note for x in conversion.having("unused")} == {"fully connected layers of ImageNet"}


def small_resnet():
    """A backbone as FCIS has it, in a module that keeps it under "backbone"."""
    model = torch.nn.Module()
    model.backbone = CaffeResNet(
        depth=50, stem_out_channels=4, res2_out_channels=8, width_per_group=2, norm="FrozenBN"
    )
    return model


def test_image_net_weights_in_detectron2s_names_load(tmp_path):
    """As detectron2 converts torchvision's: names without "backbone.", matched by their ends."""
    source, model = small_resnet(), small_resnet()
    for value in source.state_dict().values():
        value.copy_(torch.rand_like(value))
    arrays = {k[len("backbone.") :]: v.numpy() for k, v in source.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    Checkpointer(model).load(str(tmp_path / "R-50.pkl"))
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_image_net_weights_in_caffe2s_names_load(tmp_path):
    """As in detectron2's MSRA files: batch norm is a scale and a bias only."""
    model, arrays = small_resnet(), {}
    letters = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    expected = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[-1].startswith("running"):
            continue
        if parts[1] == "stem":
            layer, bn = "conv1", "res_conv1_bn"
        else:
            layer = bn = f"{parts[1]}_{parts[2]}_{letters[parts[3]]}"
            bn += "_bn"
        end = {"weight": "s", "bias": "b"}[parts[-1]] if "norm" in parts else "w"
        expected[name] = torch.rand_like(value)
        arrays[f"{bn if 'norm' in parts else layer}_{end}"] = expected[name].numpy()
    arrays["conv1_w_momentum"] = arrays["conv1_w"]
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(arrays, protocol=2))
    Checkpointer(model).load(str(tmp_path / "R-50.pkl"))
    for name, value in expected.items():
        assert model.state_dict()[name].equal(value), name
