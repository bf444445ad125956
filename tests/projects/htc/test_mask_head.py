import pytest
import torch
from torch.nn import functional as F

from d2ext.projects.htc import HTCMaskHead

from detectron2.layers import ShapeSpec

SHAPE = ShapeSpec(channels=6, height=14, width=14)


def head(**kwargs):
    torch.manual_seed(0)
    result = HTCMaskHead(SHAPE, num_classes=3, conv_dims=[8, 8, 8], **kwargs)
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return result


def test_trunk_and_output_follow_the_paper():
    layer = head(information_flow=True)
    x, previous = torch.randn(2, 6, 14, 14), torch.randn(2, 8, 14, 14)
    p = dict(layer.named_parameters())
    z = x + F.relu(F.conv2d(previous, p["conv_res.weight"], p["conv_res.bias"]))
    for name in ("mask_fcn1", "mask_fcn2"):
        z = F.relu(F.conv2d(z, p[f"{name}.weight"], p[f"{name}.bias"], padding=1))
    assert torch.allclose(layer.trunk(x, previous), z, atol=1e-5)
    y = F.relu(F.conv_transpose2d(z, p["deconv.weight"], p["deconv.bias"], stride=2))
    y = F.conv2d(y, p["predictor.weight"], p["predictor.bias"])
    assert torch.allclose(layer.output(z), y, atol=1e-5)
    assert y.shape == (2, 3, 28, 28)


def test_without_previous_features_the_inlet_is_not_used():
    x = torch.randn(2, 6, 14, 14)
    flow, plain = head(information_flow=True), head()
    flow.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(flow.layers(x), plain.layers(x))


def test_inlet_exists_only_with_information_flow():
    names = {"mask_fcn1", "mask_fcn2", "deconv", "predictor"}
    assert {n.split(".")[0] for n in head().state_dict()} == names
    assert {n.split(".")[0] for n in head(information_flow=True).state_dict()} == names | {
        "conv_res"
    }


@pytest.mark.parametrize("conv_dims, channels", [([8, 8, 4], 8), ([4], 6)])
def test_inlet_takes_the_channels_of_the_trunk(conv_dims, channels):
    layer = HTCMaskHead(SHAPE, num_classes=3, conv_dims=conv_dims, information_flow=True)
    assert layer.conv_res.weight.shape == (6, channels, 1, 1)


def test_zero_regions_give_zero_gradients_instead_of_none():
    layer = head(information_flow=True)
    layer.output(layer.trunk(torch.zeros(0, 6, 14, 14), torch.zeros(0, 8, 14, 14))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in layer.parameters())
