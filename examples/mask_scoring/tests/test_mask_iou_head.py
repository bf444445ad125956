"""The MaskIoU head against its description in section 3.2 of the paper."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mask_scoring import MaskIoUHead

from detectron2.layers import ShapeSpec


def head_for(channels=256, side=14, num_classes=80, conv_dim=256, fc_dim=1024):
    shape = ShapeSpec(channels=channels, height=side, width=side)
    return MaskIoUHead(input_shape=shape, num_classes=num_classes, conv_dim=conv_dim, fc_dim=fc_dim)


def test_layers_are_those_of_the_paper():
    head = head_for()
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [c.in_channels for c in convs] == [257, 256, 256, 256]
    assert [c.out_channels for c in convs] == [256] * 4
    assert [c.stride for c in convs] == [(1, 1), (1, 1), (1, 1), (2, 2)]
    assert {c.kernel_size for c in convs} == {(3, 3)}
    fcs = [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]
    assert fcs == [(256 * 7 * 7, 1024), (1024, 1024), (1024, 80)]


def test_the_mask_is_the_last_channel_after_max_pooling():
    head = head_for(channels=3, side=6, num_classes=5, conv_dim=4, fc_dim=7)
    features, masks = torch.randn(2, 3, 6, 6), torch.rand(2, 1, 12, 12)
    small = torch.empty(2, 1, 6, 6)
    for y in range(6):
        for x in range(6):
            small[:, :, y, x] = masks[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].amax((2, 3))
    x = torch.cat([features, small], 1)
    for conv, stride in zip(head.convs, (1, 1, 1, 2)):
        x = F.conv2d(x, conv.weight, conv.bias, stride, padding=1).relu()
    for layer in (head.fc1, head.fc2):
        x = (x.flatten(1) @ layer.weight.T + layer.bias).relu()
    expected = x @ head.predictor.weight.T + head.predictor.bias
    assert expected.shape == (2, 5)
    torch.testing.assert_close(head(features, masks), expected)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("count", [0, 3])
def test_any_number_of_regions_and_odd_sides_are_fine(side, count):
    head = head_for(channels=2, side=side, num_classes=4, conv_dim=3, fc_dim=5)
    found = head(torch.randn(count, 2, side, side), torch.rand(count, 1, 2 * side, 2 * side))
    assert found.shape == (count, 4)
