import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.modeling.backbone import DeformBottleneckBlock

from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock as Detectron2Block

ARGUMENTS = {"bottleneck_channels": 8, "num_groups": 4, "norm": "FrozenBN"}


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("stride, stride_in_1x1", [(1, False), (2, False), (2, True)])
def test_parameters_have_the_names_and_shapes_of_detectron2(modulated, stride, stride_in_1x1):
    extra = {
        "stride": stride,
        "stride_in_1x1": stride_in_1x1,
        "deform_modulated": modulated,
        "deform_num_groups": 2,
    }
    ours = DeformBottleneckBlock(8, 16, **ARGUMENTS, **extra)
    theirs = Detectron2Block(8, 16, **ARGUMENTS, **extra)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert ours(torch.randn(1, 8, 12, 12)).shape == (1, 16, 12 // stride, 12 // stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_offsets_give_an_ordinary_bottleneck(stride):
    plain = BottleneckBlock(8, 16, stride=stride, **ARGUMENTS)
    deform = DeformBottleneckBlock(8, 16, stride=stride, **ARGUMENTS)
    missing, _ = deform.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["conv2_offset.weight", "conv2_offset.bias"]
    x = torch.randn(2, 8, 10, 14, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(deform(x), plain(x), atol=1e-5)


def test_offset_order_is_dy_then_dx():
    """A constant offset (1, 0) of all taps shifts the input of the 3x3 convolution by one row."""
    block = DeformBottleneckBlock(8, 16, **ARGUMENTS)
    x = torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    offset = torch.zeros(1, 18, 9, 9)
    unshifted = block.conv2(x, offset)
    offset[:, 0::2] = 1.0
    shifted = block.conv2(x, offset)
    assert torch.allclose(shifted[:, :, 1:-2, 1:-1], unshifted[:, :, 2:-1, 1:-1], atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_all_parameters_train_on_the_cpu(modulated):
    block = DeformBottleneckBlock(8, 16, deform_modulated=modulated, **ARGUMENTS)
    torch.nn.init.normal_(block.conv2_offset.bias, std=0.3)
    block(torch.randn(1, 8, 8, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())
