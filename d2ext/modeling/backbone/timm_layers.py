"""Which layer of a network of timm a parameter belongs to, for learning rates that fall from the
last layer to the first, and which of its parameters do without weight decay."""

import re
from collections.abc import Sequence

from torch import nn

from d2ext.errors import UserError

GROUP = 3  # blocks of the third stage that share a layer, see `number_layers`


def stage_ends(names: Sequence[str], stages: Sequence[str]) -> tuple[int, list[int]]:
    """Rows of the parameters of each stage, in the order in which timm made them.

    Args:
        names: of all parameters.
        stages: modules that end in a feature map.

    Returns:
        the first row of the first stage, and the row after the last one of each.
    """
    # timm flattens `stages.0` to `stages_0`.
    prefixes = [(f"{s}.", f"{s.replace('.', '_', 1)}.") for s in stages]
    rows = [[i for i, name in enumerate(names) if name.startswith(p)] for p in prefixes]
    return min(rows[0]), [max(row) + 1 for row in rows]


def names_in_whole(names: Sequence[str], full: nn.Module) -> dict[str, str]:
    """Names of parameters among the feature maps -> those in the network as timm made it."""
    known = {name for name, _ in full.named_parameters()}
    found = {}
    for name in names:
        unwrapped = name.removeprefix("model.").removeprefix("body.")
        nested = re.sub(r"^([a-z_]+?)_(\d+)\.", r"\1.\2.", unwrapped)
        found[name] = nested if nested in known else unwrapped
    return found


def number_layers(
    net: nn.Module, full: nn.Module, stages: Sequence[str], title: str
) -> tuple[dict[str, int], int]:
    """The number of the layer of every parameter, and that of the last layer.

    A plain ViT has its embedding as layer 0 and one layer for each block (BEiT, Bao et al., ICLR
    2022; ViTDet, Li et al., ECCV 2022, appendix). In networks of four stages the stem is layer 0,
    the first two stages are a layer each, every `GROUP` blocks of the third one are, and the last
    stage (ConvNeXt, Liu et al., CVPR 2022, appendix A.3, which calls it layer-wise); what
    leads from a stage to the next one counts as the next one's first block.

    Args:
        net: the network that gives feature maps.
        full: the same as timm makes it.
        stages: modules of `net` that end in a feature map; none for a plain ViT.
        title: its name, for messages.
    """
    from timm.models._manipulate import group_with_matcher

    if not hasattr(full, "group_matcher"):
        raise UserError(
            f"SOLVER.LAYER_DECAY / optimizer.layer_decay: timm's {title} does not tell its layers"
        )
    names = [name for name, _ in net.named_parameters()]
    whole = names_in_whole(names, full)
    matcher = full.group_matcher(coarse=False)
    depth = group_with_matcher(((whole[n], n) for n in names), matcher, reverse=True)
    depths = {name: depth[whole[name]] for name in names}
    if not stages:
        return depths, max(depths.values())
    start, ends = stage_ends(names, stages)
    stage_of = {
        name: 1 + sum(row >= end for end in ends) if row >= start else 0
        for row, name in enumerate(names)
    }
    third = [depths[name] for name in names if stage_of[name] == 3]
    last = 3 + (max(third) - min(third)) // GROUP + 1
    numbers = {}
    for name in names:
        stage = stage_of[name]
        inside = (depths[name] - min(third)) // GROUP if stage == 3 else 0
        numbers[name] = last if stage > 3 else stage + inside
    return numbers, last


def without_decay(net: nn.Module, full: nn.Module) -> set[str]:
    """Names of parameters that timm exempts: position embeddings and tables, tokens."""
    names = [name for name, _ in net.named_parameters()]
    exempt = full.no_weight_decay() if hasattr(full, "no_weight_decay") else ()
    return {name for name, other in names_in_whole(names, full).items() if other in exempt}
