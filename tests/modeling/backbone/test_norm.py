import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.modeling.backbone import EvalStatsBatchNorm2d, narrow_group_norm, resolve_norm

from detectron2.layers import FrozenBatchNorm2d, get_norm


def filled(layer):
    generator = torch.Generator().manual_seed(0)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def test_stored_statistics_are_used_and_kept_in_training_mode():
    layer = filled(EvalStatsBatchNorm2d(4)).train()
    x = torch.randn(2, 4, 3, 3) * 5 + 1
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    c = (slice(None), None, None)
    expected = (x - layer.running_mean[c]) / (layer.running_var[c] + 1e-5).sqrt()
    assert torch.allclose(layer(x), expected * layer.weight[c] + layer.bias[c], atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_scale_and_bias_are_trained():
    layer = EvalStatsBatchNorm2d(4)
    layer(torch.randn(2, 4, 3, 3)).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0 and layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("other", [torch.nn.BatchNorm2d, FrozenBatchNorm2d])
def test_weights_of_other_batch_norms_load_and_give_the_same_output(other):
    source = filled(other(4)).eval()
    layer = EvalStatsBatchNorm2d(4)
    result = layer.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(layer(x), source(x), atol=1e-6)


def test_its_weights_load_into_a_frozen_batch_norm():
    layer, frozen = filled(EvalStatsBatchNorm2d(4)), FrozenBatchNorm2d(4)
    frozen.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(layer(x), frozen(x), atol=1e-6)


@pytest.mark.parametrize(
    "channels, groups", [(8, 4), (16, 8), (48, 8), (64, 32), (256, 32), (3, 1)]
)
def test_group_norm_keeps_two_channels_a_group_up_to_32_groups(channels, groups):
    layer = narrow_group_norm(channels)
    assert layer.num_groups == groups
    layer(torch.randn(1, channels, 2, 2))


def test_names_resolve_to_layers():
    assert isinstance(get_norm(resolve_norm("EvalStatsBN"), 8), EvalStatsBatchNorm2d)
    assert isinstance(get_norm(resolve_norm("FrozenBN"), 8), FrozenBatchNorm2d)
    assert get_norm(resolve_norm("GN"), 8).num_groups == 4
    assert get_norm(resolve_norm(""), 8) is None
    assert resolve_norm(torch.nn.BatchNorm2d) is torch.nn.BatchNorm2d
