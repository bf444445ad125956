"""The weights of a plain ViT in the network with windows that ViTDet makes of it."""

import pytest
import torch

from d2ext.errors import UserError
from d2ext.modeling.backbone.timm_weights import load_vit_weights, resize_positions

pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def networks(**options):
    torch.manual_seed(0)
    plain = VisionTransformer(img_size=64, num_classes=0, **SIZES)
    with_windows = VisionTransformerSAM(
        img_size=options.pop("img_size", 64),
        num_classes=0,
        neck_chans=0,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
        **{**SIZES, **options},
    )
    with_windows.prune_intermediate_layers(1, prune_norm=True)  # as where features are taken
    return plain.eval(), with_windows.eval()


def test_on_the_grid_of_the_pretraining_global_blocks_compute_the_same():
    plain, other = networks()
    for block in other.blocks:
        block.window_size = 0  # so that both look at the whole image
    load_vit_weights(other, plain.state_dict(), "plain")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        # Without its token, which the other one lacks.
        tokens = plain.patch_embed(image) + plain.pos_embed[:, 1:]
        expected = plain.blocks(tokens)
        (found,) = other.forward_intermediates(image, indices=1, intermediates_only=True)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_positions_are_resampled_and_relative_ones_stay_zero():
    plain, other = networks(img_size=128)
    with torch.no_grad():
        plain.pos_embed[:, 1:] = 3.0
    load_vit_weights(other, plain.state_dict(), "plain")
    assert other.pos_embed.shape == (1, 8, 8, 16)
    torch.testing.assert_close(other.pos_embed, torch.full_like(other.pos_embed, 3.0))
    assert not other.blocks[0].attn.rel_pos_h.any()
    assert torch.equal(other.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight)


def test_a_table_of_the_size_of_the_pretraining_is_taken_over_and_resampled_to_the_image():
    plain, other = networks(img_size=128)
    resize_positions(other, 4, "samvit")
    load_vit_weights(other, plain.state_dict(), "plain")
    assert torch.equal(other.pos_embed.flatten(1, 2), plain.pos_embed[:, 1:])
    assert "pos_embed" in dict(other.named_parameters())
    image = torch.rand(1, 3, 128, 96, requires_grad=True)
    (found,) = other.forward_intermediates(image, indices=1, intermediates_only=True)
    assert found.shape == (1, 16, 8, 6)
    with pytest.raises(UserError, match="POSITIONS: plain has no table of positions"):
        resize_positions(plain, 4, "plain")


def test_a_network_of_another_size_is_refused_in_one_line():
    plain, other = networks(embed_dim=32)
    with pytest.raises(UserError, match="weights of timm's plain do not fit: pos_embed is") as e:
        load_vit_weights(other, plain.state_dict(), "plain")
    assert "\n" not in str(e.value)
