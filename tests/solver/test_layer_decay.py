"""Learning rates that fall layer by layer and parameters without weight decay, each parameter of a
network of every family against the rules of the papers written down once more."""

import re

import pytest
import torch
from torch import nn

from d2ext.config import get_cfg
from d2ext.errors import UserError
from d2ext.modeling.backbone import SimpleFeaturePyramid, TimmBackbone, TimmFPN
from d2ext.solver import build_optimizer, get_optimizer_params, make_optimizer

pytest.importorskip("timm")
RATE = 0.8
# Family: name, blocks of the third stage (of all for a plain ViT), settings.
STAGED = {
    "ConvNeXt-Atto": ("convnext_atto", 6, {"out_norm": "LN"}),
    "ConvNeXt-T": ("convnext_tiny", 9, {}),
    "ConvNeXt-S": ("convnext_small", 27, {}),
    "Swin-T": ("swin_tiny_patch4_window7_224", 6, {"out_norm": "LN"}),
    "Swin-S": ("swin_small_patch4_window7_224", 18, {}),
}
PLAIN = {
    "ViT-T": ("vit_tiny_patch16_224", 12),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", 12),
    "DINOv3": ("vit_small_patch16_dinov3", 12),
    "SAM": ("samvit_base_patch16", 12),
}
_BLOCK = re.compile(r"backbone\.bottom_up\.net\.(?:stages|layers)_(\d)\.(?:blocks\.(\d+))?")


class Detector(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(16, 4)


def detector(name, **options):
    with torch.device("meta"):
        net = TimmBackbone(name=name, **options)
        plain = list(net.output_shape()) == ["last"]
        kind = SimpleFeaturePyramid if plain else TimmFPN
        return Detector(kind(bottom_up=net, out_channels=16))


def settings(model, key, **options):
    """Parameter name -> the value of one setting."""
    groups = get_optimizer_params(model, base_lr=1.0, weight_decay=0.05, **options)
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p]: group[key] for group in groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def staged_rate(name, blocks):
    """ConvNeXt paper, appendix A.3, and its repository: three blocks of stage 3 are a layer."""
    last = 3 + -(-blocks // 3)
    if name.startswith(("backbone.bottom_up.net.stem", "backbone.bottom_up.net.patch_embed")):
        return RATE ** (last + 1)
    found = _BLOCK.match(name)
    if not found:
        return 1.0
    stage, block = int(found[1]), int(found[2] or 0)
    return RATE ** (last + 1 - [1, 2, 3 + block // 3, last][stage])


def plain_rate(name, blocks):
    """BEiT and ViTDet: the embedding is layer 0, each block one, all the rest one more."""
    inside = name.removeprefix("backbone.bottom_up.net.model.")
    if inside == name:
        return 1.0
    if inside.startswith("blocks."):
        return RATE ** (blocks - int(inside.split(".")[1]))
    assert inside.split(".")[0] in ("patch_embed", "pos_embed", "cls_token", "reg_token")
    return RATE ** (blocks + 1)


@pytest.mark.parametrize("family", STAGED)
def test_rates_of_stages_fall_as_in_convnexts_repository(family):
    name, blocks, options = STAGED[family]
    found = settings(detector(name, **options), "lr", layer_decay=RATE)
    assert found == pytest.approx({n: staged_rate(n, blocks) for n in found})
    assert len(set(found.values())) == 3 + -(-blocks // 3) + 2


@pytest.mark.parametrize("family", PLAIN)
def test_rates_of_a_plain_vit_fall_block_by_block(family):
    name, blocks = PLAIN[family]
    found = settings(detector(name), "lr", layer_decay=RATE)
    assert found == pytest.approx({n: plain_rate(n, blocks) for n in found})
    assert len(set(found.values())) == blocks + 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "efficientnet_b0"])
def test_in_other_networks_rates_rise_from_the_stem_on(name):
    model = detector(name, norm="")
    numbers, last = model.backbone.bottom_up.layer_numbers()
    values = list(numbers.values())
    assert values == sorted(values) and set(values) == set(range(last + 1))


@pytest.mark.parametrize("family", ["ConvNeXt-Atto", "Swin-T", "ViT-T", "SAM"])
def test_only_matrices_and_kernels_decay(family):
    name, _, options = STAGED.get(family) or (*PLAIN[family], {})
    model = detector(name, **options)
    found = settings(model, "weight_decay", decay_matrices_only=True, weight_decay_norm=0.3)
    shapes = {n: p.dim() for n, p in model.named_parameters()}
    exempt = ("relative_position_bias_table", "pos_embed", "cls_token")
    assert found == {
        n: 0.0 if dim == 1 or n.endswith(exempt) else 0.05 for n, dim in shapes.items()
    }
    unlike = [n for n in found if shapes[n] > 1 and not found[n]]
    count = {"ConvNeXt-Atto": 0, "Swin-T": 12, "ViT-T": 2, "SAM": 1}[family]
    assert len(unlike) == count
    assert 0.05 in settings(model, "weight_decay").values()


def test_multipliers_come_on_top_of_the_layers():
    model = detector("convnext_atto")
    found = settings(
        model, "lr", layer_decay=RATE, lr_multipliers=[["head", 3.0], ["backbone.bottom_up", 0.5]]
    )
    assert found["head.weight"] == 3.0 and found["backbone.fpn_lateral2.weight"] == 1.0
    assert found["backbone.bottom_up.net.stem_0.weight"] == pytest.approx(0.5 * RATE**6)


@pytest.mark.parametrize("decay", [0, -0.5, 1.1])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(UserError, match=rf"layer_decay is {decay}; it has to be above 0"):
        get_optimizer_params(nn.Linear(2, 2), 1.0, 0.0, layer_decay=decay)


def test_a_backbone_without_numbered_layers_is_told():
    with pytest.raises(UserError, match="does not number its layers; networks of timm do"):
        make_optimizer(nn.Linear(2, 2), layer_decay=0.9)


def test_yaml_keys_reach_the_groups():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = "AdamW", 0.1, 0.05
    cfg.SOLVER.LAYER_DECAY, cfg.SOLVER.DECAY_MATRICES_ONLY = RATE, True
    model = detector("convnext_atto")
    lazy = make_optimizer(
        model, name="AdamW", lr=0.1, weight_decay=0.05, layer_decay=RATE, decay_matrices_only=True
    )
    found = []
    for optimizer in (build_optimizer(cfg, model), lazy):
        names = {p: n for n, p in model.named_parameters()}
        groups = optimizer.param_groups
        found.append({names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})
    assert found[0] == found[1]
    assert found[0]["backbone.bottom_up.net.stem_0.weight"] == pytest.approx((0.1 * RATE**6, 0.05))
    assert found[0]["head.bias"] == (0.1, 0.0)
