"""What weights need from a model: set when they are loaded, stored with them, refused if odd."""

import pytest
import torch
from torch import nn

from d2ext.checkpoint.settings import apply_settings, settings_to_config
from d2ext.config import get_config_file, load_config
from d2ext.errors import UserError


class Coder:
    def __init__(self):
        self.weights = (10.0, 10.0, 5.0, 5.0)


class Model(nn.Module):
    def __init__(self, order="BGR"):
        super().__init__()
        self.input_format = order
        self.register_buffer("pixel_mean", torch.tensor([1.0, 2, 3]).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.ones(3, 1, 1), False)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, stride=2))
        self.heads = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.heads[1].coder = Coder()
        self.average = "probs"
        self.flag = False

    def forward(self, x):
        return self.backbone[0]((x - self.pixel_mean) / self.pixel_std)


def test_values_of_every_kind_are_set_and_told():
    model = Model()
    settings = {
        "pixel_mean": [4.0, 5, 6],
        "heads.1.coder.weights": [5.0, 5.0, 2.0, 2.0],
        "backbone.1.stride": [1, 1],
        "average": "logits",
        "flag": True,
        "pixel_std": [1.0, 1.0, 1.0],
    }
    lines, kept = apply_settings(model, settings)
    assert lines == [
        "pixel_mean set to (4, 5, 6) (was (1, 2, 3))",
        "heads.1.coder.weights set to (5, 5, 2, 2) (was (10, 10, 5, 5))",
        "backbone.1.stride set to (1, 1) (was (2, 2))",
        "average set to logits (was probs)",
        "flag set to True (was False)",
    ]
    assert kept == settings
    assert model.pixel_mean.shape == (3, 1, 1) and model.pixel_mean.flatten().tolist() == [4, 5, 6]
    assert model.heads[1].coder.weights == (5, 5, 2, 2)
    assert model.backbone[1](torch.zeros(1, 4, 5, 5)).shape == (1, 4, 3, 3)
    assert apply_settings(model, settings) == ([], settings)


def test_rounding_is_no_change():
    model = Model()
    model.heads[1].coder.weights = (1 / 0.033, 10.0, 5.0, 5.0)
    assert (
        apply_settings(model, {"heads.1.coder.weights": [30.30303030303030303, 10, 5, 5]})[0] == []
    )


def test_another_channel_order_turns_the_first_layer_around():
    """The results stay those of the weights on the order they were made for."""
    torch.manual_seed(0)
    settings = {"input_format": "RGB", "pixel_mean": [4.0, 5, 6], "pixel_std": [1.0, 2, 3]}
    original, other = Model("RGB"), Model("BGR")
    other.load_state_dict(original.state_dict())
    image = torch.rand(3, 5, 5)
    assert apply_settings(original, settings)[1] == settings
    lines, kept = apply_settings(other, settings)
    assert lines[0] == "input channels of the first layer turned from RGB to BGR"
    torch.testing.assert_close(other(image.flip(0)), original(image))
    # What is stored beside these weights fits them: loading them again turns nothing.
    assert kept == {"input_format": "BGR", "pixel_mean": [6, 5, 4], "pixel_std": [3, 2, 1]}
    again = Model("BGR")
    again.load_state_dict(other.state_dict())
    assert not any("turned" in line for line in apply_settings(again, kept)[0])
    torch.testing.assert_close(again(image.flip(0)), original(image))


@pytest.mark.parametrize(
    "path, value",
    [
        ("absent", 1),
        ("heads.7.coder.weights", [1, 1, 1, 1]),
        ("heads.x", 1),
        ("average", 3),
        ("average", ["logits"]),
        ("flag", 1),
        ("flag", "yes"),
        ("pixel_mean", [1.0]),
        ("heads.1.coder.weights", [1.0, 1.0]),
        ("heads.1.coder.weights", "abcd"),
        ("forward", "x"),
        ("backbone.0.weight", 0.0),
        ("_modules.backbone", "x"),
        ("__class__", "x"),
    ],
)
def test_what_a_model_cannot_have_is_refused(path, value):
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="checkpoint 'file.pth' needs .* cannot have"):
        apply_settings(model, {path: value}, "file.pth")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_order_that_is_no_permutation_of_colours_is_refused():
    with pytest.raises(UserError, match="takes L images, the model BGR"):
        apply_settings(Model(), {"input_format": "L"}, "x")


SETTINGS = {
    "input_format": "RGB",
    "pixel_mean": [1.0, 2.0, 3.0],
    "pixel_std": [4.0, 5.0, 6.0],
    "backbone.bottom_up.res3.0.conv1.stride": [1, 1],
    "backbone.bottom_up.res3.0.conv2.stride": [2, 2],
    "roi_heads.other": "x",
}


@pytest.mark.parametrize("name", ["mask", "cascade_mask"])
def test_a_yaml_config_holds_the_settings(name):
    cfg = load_config(get_config_file(f"{name}_rcnn_R_50_FPN_1x_coco.yaml"))
    cfg.freeze()
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.INPUT.FORMAT == "BGR"
    stage = ".1" if name == "cascade_mask" else ""
    weights = {f"roi_heads.box_predictor{stage}.box2box_transform.weights": [7.0, 7.0, 3.0, 3.0]}
    assert settings_to_config(cfg, {**SETTINGS, **weights}) == ["roi_heads.other"]
    assert cfg.INPUT.FORMAT == "RGB" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([1, 2, 3], [4, 5, 6])
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    found = list(cascade[1]) if stage else list(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    assert found == [7, 7, 3, 3] and list(cascade[0]) == [10, 10, 5, 5]
    settings_to_config(cfg, {"backbone.bottom_up.res3.0.conv1.stride": [2, 2]})
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1


@pytest.mark.parametrize("name", ["mask", "cascade_mask"])
def test_a_lazy_config_holds_the_settings(name):
    cfg = load_config(get_config_file(f"{name}_rcnn_R_50_FPN_1x_coco.py"))
    stage = ".1" if name == "cascade_mask" else ""
    weights = {f"roi_heads.box_predictor{stage}.box2box_transform.weights": [7.0, 7.0, 3.0, 3.0]}
    assert settings_to_config(cfg, {**SETTINGS, **weights}) == ["roi_heads.other"]
    assert (cfg.model.input_format, cfg.model.backbone.stride_in_1x1) == ("RGB", False)
    assert (cfg.model.pixel_mean, cfg.model.pixel_std) == ([1, 2, 3], [4, 5, 6])
    heads = cfg.model.roi_heads
    predictor = heads.box_predictors[1] if stage else heads.box_predictor
    assert predictor.box2box_transform.weights == [7, 7, 3, 3]
