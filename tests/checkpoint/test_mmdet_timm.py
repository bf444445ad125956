"""Mask R-CNN of MMDetection with Swin and ConvNeXt: names and shapes of its files written down here
once more, and both backbones computed from such a file by a second implementation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2ext.checkpoint import CheckpointFile, import_weights
from d2ext.checkpoint.importers.mmdet_timm import (
    SWIN_UNUSED,
    merged_patches,
    mmdet_convnext_rules,
    mmdet_swin_rules,
)
from d2ext.checkpoint.mapping import convert_weights, shapes_of
from d2ext.modeling.backbone import TimmBackbone
from d2ext.modeling.backbone.timm import without_part_weights

from tests.checkpoint.helpers import Coded, meta_model
from tests.checkpoint.test_mmdet import box_head, mask_head, pair

pytest.importorskip("timm")
CHANNELS = (96, 192, 384, 768)
NET = "backbone.bottom_up.net."
HEADS, WINDOW = (3, 6, 12, 24), 7


def outputs(table, depths):
    for stage, channels in enumerate(CHANNELS):
        norm = f"backbone.bottom_up.out_norms.res{stage + 2}"
        pair(table, f"backbone.norm{stage}", norm, channels)
    assert len(depths) == 4


def swin(depths=(2, 2, 6, 2)):
    """Name in the file -> (our name, shape)."""
    table = {}
    pair(table, "backbone.patch_embed.projection", f"{NET}patch_embed.proj", 96, 3, 4, 4)
    pair(table, "backbone.patch_embed.norm", f"{NET}patch_embed.norm", 96)
    for stage, (channels, count) in enumerate(zip(CHANNELS, depths)):
        theirs = f"backbone.stages.{stage}"
        for block in range(count):
            a, b = f"{theirs}.blocks.{block}", f"{NET}layers_{stage}.blocks.{block}"
            pair(table, f"{a}.norm1", f"{b}.norm1", channels)
            name = "relative_position_bias_table"
            shape = ((2 * WINDOW - 1) ** 2, HEADS[stage])
            table[f"{a}.attn.w_msa.{name}"] = (f"{b}.attn.{name}", shape)
            index = f"{a}.attn.w_msa.relative_position_index"
            table[index] = (None, (WINDOW**2, WINDOW**2))
            pair(table, f"{a}.attn.w_msa.qkv", f"{b}.attn.qkv", 3 * channels, channels)
            pair(table, f"{a}.attn.w_msa.proj", f"{b}.attn.proj", channels, channels)
            pair(table, f"{a}.norm2", f"{b}.norm2", channels)
            pair(table, f"{a}.ffn.layers.0.0", f"{b}.mlp.fc1", 4 * channels, channels)
            pair(table, f"{a}.ffn.layers.1", f"{b}.mlp.fc2", channels, 4 * channels)
        if stage < 3:
            a, b = f"{theirs}.downsample", f"{NET}layers_{stage + 1}.downsample"
            pair(table, f"{a}.norm", f"{b}.norm", 4 * channels)
            pair(table, f"{a}.reduction", f"{b}.reduction", 2 * channels, 4 * channels, bias=False)
    outputs(table, depths)
    return table


def convnext(depths=(3, 3, 9, 3), official=False):
    names = ("depthwise_conv", "pointwise_conv1", "pointwise_conv2")
    names = ("dwconv", "pwconv1", "pwconv2") if official else names
    table = {}
    pair(table, "backbone.downsample_layers.0.0", f"{NET}stem_0", 96, 3, 4, 4)
    pair(table, "backbone.downsample_layers.0.1", f"{NET}stem_1", 96)
    for stage, (channels, count) in enumerate(zip(CHANNELS, depths)):
        if stage:
            a, b = f"backbone.downsample_layers.{stage}", f"{NET}stages_{stage}.downsample"
            pair(table, f"{a}.0", f"{b}.0", channels // 2)
            pair(table, f"{a}.1", f"{b}.1", channels, channels // 2, 2, 2)
        for block in range(count):
            a, b = f"backbone.stages.{stage}.{block}", f"{NET}stages_{stage}.blocks.{block}"
            table[f"{a}.gamma"] = (f"{b}.gamma", (channels,))
            pair(table, f"{a}.{names[0]}", f"{b}.conv_dw", channels, 1, 7, 7)
            pair(table, f"{a}.norm", f"{b}.norm", channels)
            pair(table, f"{a}.{names[1]}", f"{b}.mlp.fc1", 4 * channels, channels)
            pair(table, f"{a}.{names[2]}", f"{b}.mlp.fc2", channels, 4 * channels)
    outputs(table, depths)
    return table


def detector(table):
    """The rest of Mask R-CNN."""
    for n, channels in enumerate(CHANNELS):
        lateral, output = f"backbone.fpn_lateral{n + 2}", f"backbone.fpn_output{n + 2}"
        pair(table, f"neck.lateral_convs.{n}.conv", lateral, 256, channels, 1, 1)
        pair(table, f"neck.fpn_convs.{n}.conv", output, 256, 256, 3, 3)
    ours = "proposal_generator.rpn_head"
    pair(table, "rpn_head.rpn_conv", f"{ours}.conv", 256, 256, 3, 3)
    pair(table, "rpn_head.rpn_cls", f"{ours}.objectness_logits", 3, 256, 1, 1)
    pair(table, "rpn_head.rpn_reg", f"{ours}.anchor_deltas", 12, 256, 1, 1)
    box_head(table, "roi_head.bbox_head", "roi_heads.{}", deltas=320)
    mask_head(table, "roi_head.mask_head", "roi_heads.mask_head")
    return table


FAMILIES = {
    "swin": (swin, "configs/mask_rcnn_swin_T"),
    "convnext": (convnext, "configs/mask_rcnn_convnext_T"),
    "convnext of its authors": (lambda: convnext(official=True), "configs/mask_rcnn_convnext_T"),
}


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_names_map_one_to_one(family, kind):
    make, config = FAMILIES[family]
    table, coded = detector(make()), Coded()
    for name, (_, shape) in table.items():
        coded.add(name, *shape)
    with without_part_weights():
        model = meta_model(f"{config}.{kind}")
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded, {}), model)
    conversion.check("x.pth")
    assert conversion.title == "MMDetection"
    expected = {ours: theirs for theirs, (ours, _) in table.items() if ours}
    assert set(conversion.weights) == set(expected) == set(model.state_dict())
    merging = [ours for ours in expected if f"{NET}layers" in ours and ".downsample." in ours]
    assert len(merging) == (9 if family == "swin" else 0)
    for ours, theirs in expected.items():
        if ours not in merging:
            assert conversion.weights[ours] is coded[theirs], ours
    unused = {x.source: x.note for x in conversion.having("unused")}
    assert set(unused) == {x for x, (ours, _) in table.items() if ours is None}
    assert set(unused.values()) <= {"follows from the size of the window"}
    assert conversion.settings["pixel_mean"] == [123.675, 116.28, 103.53]


def test_merged_patches_are_those_of_the_same_neighbours():
    image = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    unfolded = F.unfold(image, 2, stride=2)[0].t()  # positions x channels, as MMDetection has them
    rows, columns = image[0, :, 0::2], image[0, :, 1::2]
    parts = [rows[..., 0::2], columns[..., 0::2], rows[..., 1::2], columns[..., 1::2]]
    as_in_paper = torch.cat(parts).flatten(1).t()
    assert torch.equal(merged_patches(unfolded), as_in_paper)
    weight = torch.rand(3, 8)
    torch.testing.assert_close(as_in_paper @ merged_patches(weight).t(), unfolded @ weight.t())


# ------------------------------------------------------------------- the second implementation


def random_file(table, seed=0):
    """Values of the size that trained ones have."""
    draw = torch.Generator().manual_seed(seed)
    file = {}
    for name, (ours, shape) in table.items():
        x = torch.randn(shape, generator=draw)
        if ours is None:
            x = x.long()
        elif len(shape) == 1:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        else:
            x = x * (0.5 if "table" in name else (x[0].numel() ** -0.5))
        file[name] = x
    return file


def norm(file, name, x, eps=1e-5):
    """Over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"], eps)


def linear(file, name, x):
    return F.linear(x, file[f"{name}.weight"], file[f"{name}.bias"])


def window_attention(file, name, x, heads, shift):
    """N x H x W x C; every pair of cells by itself is looked up, none is rolled around."""
    count, height, width, channels = x.shape
    rows = torch.arange(-(-height // WINDOW) * WINDOW)
    columns = torch.arange(-(-width // WINDOW) * WINDOW)
    x = F.pad(x, (0, 0, 0, len(columns) - width, 0, len(rows) - height))
    qkv = linear(file, f"{name}.qkv", x).view(*x.shape[:3], 3, heads, channels // heads)
    table = file[f"{name}.relative_position_bias_table"]
    out = torch.zeros_like(x)
    # Shifted by 3, the first whole window starts at cell 3; those at the borders are cut off.
    starts = [range(shift - WINDOW if shift else 0, len(r), WINDOW) for r in (rows, columns)]
    for top in starts[0]:
        for left in starts[1]:
            ys = rows[max(top, 0) : top + WINDOW]
            xs = columns[max(left, 0) : left + WINDOW]
            y, z = (g.flatten() for g in torch.meshgrid(ys, xs, indexing="ij"))
            q, k, v = qkv[:, y, z].permute(2, 0, 3, 1, 4)
            difference_y = y[:, None] - y[None] + WINDOW - 1
            difference_x = z[:, None] - z[None] + WINDOW - 1
            bias = table[difference_y * (2 * WINDOW - 1) + difference_x].permute(2, 0, 1)
            weight = (q @ k.transpose(-1, -2) * (channels // heads) ** -0.5 + bias).softmax(-1)
            out[:, y, z] = (weight @ v).transpose(1, 2).reshape(count, len(y), channels)
    return linear(file, f"{name}.proj", out)[:, :height, :width]


def swin_features(file, image, depths=(2, 2, 6, 2)):
    embedding = "backbone.patch_embed"
    weight, bias = (file[f"{embedding}.projection.{x}"] for x in ("weight", "bias"))
    x = F.conv2d(image, weight, bias, stride=4).permute(0, 2, 3, 1)
    x, found = norm(file, f"{embedding}.norm", x), []
    for stage, count in enumerate(depths):
        name = f"backbone.stages.{stage}"
        for block in range(count):
            own = f"{name}.blocks.{block}"
            shift = WINDOW // 2 if block % 2 else 0
            y = norm(file, f"{own}.norm1", x)
            y = window_attention(file, f"{own}.attn.w_msa", y, HEADS[stage], shift)
            x = x + y
            y = F.gelu(linear(file, f"{own}.ffn.layers.0.0", norm(file, f"{own}.norm2", x)))
            x = x + linear(file, f"{own}.ffn.layers.1", y)
        found.append(norm(file, f"backbone.norm{stage}", x).permute(0, 3, 1, 2))
        if stage < 3:
            size = (x.shape[1] // 2, x.shape[2] // 2)
            patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
            y = norm(file, f"{name}.downsample.norm", patches)
            x = F.linear(y, file[f"{name}.downsample.reduction.weight"]).unflatten(1, size)
    return found


def convnext_features(file, image, depths=(3, 3, 9, 3)):
    def norm_first(name, x):
        return norm(file, name, x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)

    def convolution(name, x, **options):
        return F.conv2d(x, file[f"{name}.weight"], file[f"{name}.bias"], **options)

    x, found = image, []
    for stage, count in enumerate(depths):
        down = f"backbone.downsample_layers.{stage}"
        if stage:
            x = convolution(f"{down}.1", norm_first(f"{down}.0", x), stride=2)
        else:
            x = norm_first(f"{down}.1", convolution(f"{down}.0", x, stride=4))
        for block in range(count):
            own = f"backbone.stages.{stage}.{block}"
            y = convolution(f"{own}.depthwise_conv", x, padding=3, groups=x.shape[1])
            y = norm(file, f"{own}.norm", y.permute(0, 2, 3, 1), 1e-6)
            y = F.gelu(linear(file, f"{own}.pointwise_conv1", y))
            y = file[f"{own}.gamma"] * linear(file, f"{own}.pointwise_conv2", y)
            x = x + y.permute(0, 3, 1, 2)
        found.append(norm_first(f"backbone.norm{stage}", x))
    return found


class Detector(nn.Module):
    """The place of a backbone in a detector, for the rules."""

    def __init__(self, net):
        super().__init__()
        self.backbone = nn.ModuleDict({"bottom_up": net})


@pytest.mark.parametrize(
    "name, table, features",
    [
        ("swin_tiny_patch4_window7_224", swin(), swin_features),
        ("convnext_tiny", convnext(), convnext_features),
    ],
)
def test_features_are_those_of_a_second_implementation(name, table, features):
    file = random_file(table)
    net = TimmBackbone(name=name, out_norm="LN").eval()
    model = Detector(net)
    rules = mmdet_swin_rules() + mmdet_convnext_rules()
    conversion = convert_weights(shapes_of(model.state_dict()), file, rules, [SWIN_UNUSED])
    conversion.check("x.pth")
    model.load_state_dict(conversion.weights)
    image = torch.randn(1, 3, 256, 288, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = net(image), features(file, image)
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert 0.1 < theirs.std() < 10
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
