"""Swin transformers and ConvNeXts of MMDetection as the backbones that timm has: names, and the
order of the channels where Swin's patches are merged."""

from torch import Tensor

from d2ext.checkpoint.mapping import Rule

_OURS = "backbone.bottom_up.net."
SWIN_UNUSED = (r".*\.relative_position_index", "follows from the size of the window")


def merged_patches(x: Tensor) -> Tensor:
    """Channels of four neighbours as `nn.Unfold` has them, the neighbour last, rows before columns
    -> as in the Swin paper's code and in timm: neighbour first, columns before rows.

    Args:
        x: ... x 4C, the weights of the reduction or of the norm before it.
    """
    channels = x.shape[-1] // 4
    parts = x.reshape(*x.shape[:-1], channels, 2, 2)
    last = parts.dim() - 1
    return parts.permute(*range(last - 2), last, last - 1, last - 2).reshape(x.shape)


def mmdet_swin_rules() -> list[Rule]:
    """timm's names of a Swin transformer <- those of MMDetection's, whose stages end with the
    merging of patches that timm's begin with."""
    block, other = f"{_OURS}layers_{{s}}.blocks.{{j}}.", "backbone.stages.{s}.blocks.{j}."
    merging, theirs = f"{_OURS}layers_{{s}}.downsample.", "backbone.stages.{s-1}.downsample."
    attention = "relative_position_bias_table"
    return [
        Rule(f"{_OURS}patch_embed.proj.{{p:w}}", "backbone.patch_embed.projection.{p}"),
        Rule(f"{_OURS}patch_embed.norm.{{p:w}}", "backbone.patch_embed.norm.{p}"),
        Rule(f"{block}norm{{n}}.{{p:w}}", f"{other}norm{{n}}.{{p}}"),
        Rule(f"{block}attn.{attention}", f"{other}attn.w_msa.{attention}"),
        Rule(f"{block}attn.{{l:w}}.{{p:w}}", f"{other}attn.w_msa.{{l}}.{{p}}"),
        Rule(f"{block}mlp.fc1.{{p:w}}", f"{other}ffn.layers.0.0.{{p}}"),
        Rule(f"{block}mlp.fc2.{{p:w}}", f"{other}ffn.layers.1.{{p}}"),
        *(
            Rule(f"{merging}{x}.{{p:w}}", f"{theirs}{x}.{{p}}", merged_patches, label="reordered")
            for x in ("norm", "reduction")
        ),
        _out_norms(),
    ]


def mmdet_convnext_rules() -> list[Rule]:
    """timm's names of a ConvNeXt <- those of MMPretrain, which MMDetection uses, or of the ConvNeXt
    repository."""
    block, other = f"{_OURS}stages_{{s}}.blocks.{{j}}.", "backbone.stages.{s}.{j}."
    layers = (
        ("conv_dw", "depthwise_conv", "dwconv"),
        ("mlp.fc1", "pointwise_conv1", "pwconv1"),
        ("mlp.fc2", "pointwise_conv2", "pwconv2"),
        ("norm", "norm", "norm"),
    )
    return [
        Rule(f"{_OURS}stem_{{n}}.{{p:w}}", "backbone.downsample_layers.0.{n}.{p}"),
        Rule(
            f"{_OURS}stages_{{s}}.downsample.{{n}}.{{p:w}}",
            "backbone.downsample_layers.{s}.{n}.{p}",
        ),
        Rule(f"{block}gamma", f"{other}gamma"),
        *(
            Rule(f"{block}{ours}.{{p:w}}", [f"{other}{x}.{{p}}" for x in theirs])
            for ours, *theirs in layers
        ),
    ]


def _out_norms() -> Rule:
    """The norms of the feature maps, of both families."""
    return Rule("backbone.bottom_up.out_norms.res{n}.{p:w}", "backbone.norm{n-2}.{p}")
