"""Weights of a plain ViT of timm for the network that ViTDet makes of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2ext.errors import UserError


def load_vit_weights(net: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Give a ViT with windows and relative positions (timm's `samvit`) the weights of one without.

    Position embeddings are resampled to its grid. Relative positions keep their values, zero where
    the network is new (Li et al., Exploring Plain Vision Transformer Backbones for Object
    Detection, ECCV 2022, section 4).

    Args:
        net: changed in place.
        weights: of a network with the same names; tokens and norms that `net` lacks are left out.
        source: its name, for messages.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    loaded = {}
    for name, value in net.state_dict().items():
        theirs = weights.get(name)
        if theirs is None and "rel_pos" in name:
            continue
        if theirs is not None and name.endswith("pos_embed"):
            theirs = _resampled(theirs, value)
        if theirs is None or theirs.shape != value.shape:
            shape = "none" if theirs is None else tuple(theirs.shape)
            raise UserError(
                f"MODEL.TIMM.PRETRAINED: the weights of timm's {source} do not fit: {name} is "
                f"{tuple(value.shape)} here, {shape} there"
            )
        loaded[name] = theirs
    net.load_state_dict(loaded, strict=False)


def resize_positions(net: nn.Module, side: int, title: str) -> None:
    """Give timm's `samvit` a table of `side` x `side` positions; it resamples the table to the
    patches of every image.

    Args:
        net: changed in place.
        title: its name, for messages.

    Raises:
        UserError: the network has no table that it resamples.
    """
    net = getattr(net, "model", net)  # as timm wraps it to give features
    old = getattr(net, "pos_embed", None)
    if old is None or old.dim() != 4:
        raise UserError(f"MODEL.TIMM.POSITIONS: {title} has no table of positions to resize")
    from timm.layers import resample_abs_pos_embed_nhwc

    net.pos_embed = nn.Parameter(resample_abs_pos_embed_nhwc(old.detach(), [side, side]))


def _resampled(positions: Tensor, wanted: Tensor) -> Tensor:
    """Embeddings 1 x (tokens + side^2) x C in the form 1 x H x W x C of other ones."""
    if positions.dim() != 3 or wanted.dim() != 4:
        return positions
    from timm.layers import resample_abs_pos_embed_nhwc

    side = math.isqrt(positions.shape[1])
    grid = positions[:, positions.shape[1] - side * side :].reshape(1, side, side, -1)
    with torch.no_grad():
        return resample_abs_pos_embed_nhwc(grid, list(wanted.shape[1:3]))
