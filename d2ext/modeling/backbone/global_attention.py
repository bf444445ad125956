"""Transformer blocks that look at a whole feature map, as HTC++ adds one to the last of Swin."""

from torch import Tensor, nn

from d2ext.errors import UserError

HEAD_WIDTH = 32  # channels, as in every Swin transformer


def build_global_blocks(channels: int, count: int, drop_path: float = 0.0) -> nn.ModuleList:
    """Blocks of attention and MLP, each with a layer norm before, for feature maps.

    The Swin paper (Liu et al., ICCV 2021, appendix A2.2) appends a "global self-attention layer" to
    the last stage for HTC++. The parameters it gives for Swin-B and Swin-L are those of a whole
    block with the stage's width of heads; its initialisation is Swin's.

    Args:
        channels: of the map, a multiple of `HEAD_WIDTH`.
        drop_path: rate of stochastic depth.

    Raises:
        UserError: the channels are no multiple.
    """
    if count and channels % HEAD_WIDTH:
        raise UserError(
            f"MODEL.TIMM.GLOBAL_BLOCKS: heads have {HEAD_WIDTH} channels; the last map has "
            f"{channels}, which is no multiple"
        )
    if not count:
        return nn.ModuleList()
    from timm.models.vision_transformer import Block

    blocks = nn.ModuleList(
        Block(channels, channels // HEAD_WIDTH, qkv_bias=True, drop_path=drop_path)
        for _ in range(count)
    )
    for layer in blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return blocks


def apply_global_blocks(blocks: nn.ModuleList, x: Tensor, channels_last: bool) -> Tensor:
    """A feature map N x C x H x W, or N x H x W x C if `channels_last` -> one of the same form."""
    x = x if channels_last else x.permute(0, 2, 3, 1)
    tokens = x.flatten(1, 2)
    for block in blocks:
        tokens = block(tokens)
    x = tokens.reshape(x.shape)
    return x if channels_last else x.permute(0, 3, 1, 2)
