"""Blocks of attention over a whole feature map, as HTC++ has one."""

import pytest
import torch
from torch import nn

from d2ext.errors import UserError
from d2ext.modeling.backbone import TimmBackbone
from d2ext.modeling.backbone.global_attention import apply_global_blocks, build_global_blocks

pytest.importorskip("timm")


def randomised(blocks):
    torch.manual_seed(0)
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.1)
    return blocks.eval()


def test_a_block_is_pytorchs_encoder_layer_over_all_cells():
    (block,) = blocks = randomised(build_global_blocks(64, 1))
    layer = nn.TransformerEncoderLayer(
        64, 2, 256, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
        norm_first=True,
    ).eval()  # fmt: skip
    pairs = {
        "self_attn.in_proj_": block.attn.qkv,
        "self_attn.out_proj.": block.attn.proj,
        "linear1.": block.mlp.fc1,
        "linear2.": block.mlp.fc2,
        "norm1.": block.norm1,
        "norm2.": block.norm2,
    }
    state = {
        f"{k}{kind}": getattr(m, kind) for k, m in pairs.items() for kind in ("weight", "bias")
    }
    layer.load_state_dict(state)
    layer.norm1.eps, layer.norm2.eps = block.norm1.eps, block.norm2.eps
    x = torch.randn(2, 64, 3, 5)
    with torch.no_grad():
        expected = layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        found = apply_global_blocks(blocks, x, channels_last=False)
        other = apply_global_blocks(blocks, x.permute(0, 2, 3, 1), channels_last=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_only_the_last_map_is_changed_and_every_parameter_learns(name):
    torch.manual_seed(0)
    net = TimmBackbone(name=name, global_blocks=2, out_norm="LN").eval()
    image = torch.rand(1, 3, 64, 96)
    found = net(image)
    blocks, net.global_blocks = net.global_blocks, nn.ModuleList()
    plain = net(image)
    assert [k for k in plain if not torch.equal(plain[k], found[k])] == ["res5"]
    sum(x.square().mean() for x in found.values()).backward()
    assert all(p.grad is not None for p in blocks.parameters())
    # As wide as the last stage, four times in the MLP.
    width = net.output_shape()["res5"].channels
    assert sum(p.numel() for p in blocks.parameters()) == 2 * (12 * width**2 + 13 * width)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="GLOBAL_BLOCKS: heads have 32 channels; the last map has"):
        build_global_blocks(40, 1)
    with pytest.raises(UserError, match="GLOBAL_BLOCKS: OUT_FEATURES has no 'res5'"):
        TimmBackbone(name="convnext_atto", out_features=["res2"], global_blocks=1)
