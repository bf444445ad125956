import pytest
import torch
import torchvision

from d2ext.errors import UserError
from d2ext.modeling import VGG16

from detectron2.config import get_cfg
from detectron2.modeling import build_backbone


def test_convolutions_are_those_of_torchvision():
    ours, theirs = VGG16(freeze_at=0), torchvision.models.vgg16(weights=None)
    layers = [layer for layer in theirs.features if isinstance(layer, torch.nn.Conv2d)]
    names = [name for name, _ in ours.named_children()]
    assert len(names) == len(layers) == 13
    for name, layer in zip(names, layers, strict=True):
        getattr(ours, name).load_state_dict(layer.state_dict())
    image = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected = theirs.features[:-1](image)  # without the last pool
        torch.testing.assert_close(ours(image)["conv5_3"], expected)


@pytest.mark.parametrize("height, width", [(33, 47), (17, 16), (1, 100)])
def test_sizes_are_rounded_up(height, width):
    backbone = VGG16().to("meta")
    found = backbone(torch.zeros(1, 3, height, width, device="meta"))["conv5_3"]
    assert found.shape == (1, 512, -(-height // 16), -(-width // 16))
    shape = backbone.output_shape()["conv5_3"]
    assert (shape.channels, shape.stride) == (512, 16)


def test_leading_blocks_are_frozen():
    trained = {n.split(".")[0] for n, p in VGG16().to("meta").named_parameters() if p.requires_grad}
    assert trained == {f"conv{i}_{j}" for i in (3, 4, 5) for j in (1, 2, 3)}
    assert all(p.requires_grad for p in VGG16(freeze_at=0).to("meta").parameters())


def test_outputs_are_chosen_by_name():
    backbone = VGG16(out_features=["conv4_3", "conv3_1"]).to("meta")
    found = backbone(torch.zeros(1, 3, 40, 40, device="meta"))
    assert {n: tuple(x.shape[1:]) for n, x in found.items()} == {
        "conv3_1": (256, 10, 10),
        "conv4_3": (512, 5, 5),
    }
    assert {n: s.stride for n, s in backbone.output_shape().items()} == {"conv3_1": 4, "conv4_3": 8}
    with pytest.raises(UserError, match="no layer 'conv6_1'"):
        VGG16(out_features=["conv6_1"])


def test_yaml_builds_the_same_network():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_vgg16_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    found, expected = build_backbone(cfg), VGG16(freeze_at=3)
    assert {n: (p.shape, p.requires_grad) for n, p in found.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in expected.named_parameters()
    }
