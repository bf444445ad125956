"""Frozen parts and layer-wise rates, parameter by parameter."""

import pytest
import torch
from torch import nn

from d2ext.errors import UserError
from d2ext.solver import freeze_parameters, get_optimizer_params

from detectron2.layers import FrozenBatchNorm2d


def net():
    backbone = nn.Sequential()
    backbone.add_module("stem", nn.Conv2d(3, 4, 1))
    backbone.add_module("norm", nn.BatchNorm2d(4))
    backbone.add_module("res2", nn.Conv2d(4, 4, 1))
    model = nn.Module()
    model.backbone, model.box_head, model.mask_head = backbone, nn.Linear(4, 4), nn.Linear(4, 2)
    return model


NAMES = [name for name, _ in net().named_parameters()]


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ([], []),
        (["backbone.*"], [n for n in NAMES if n.startswith("backbone.")]),
        (["*.bias"], [n for n in NAMES if n.endswith(".bias")]),
        (["backbone.res?.weight", "mask_head.*"], None),
    ],
)
def test_exactly_the_parameters_that_fit_stay(patterns, frozen):
    if frozen is None:
        frozen = ["backbone.res2.weight", "mask_head.weight", "mask_head.bias"]
    model = net()
    assert sorted(freeze_parameters(model, patterns)) == sorted(frozen)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(NAMES) - set(frozen)
    in_groups = {id(p) for g in get_optimizer_params(model, 0.1, 0.0) for p in g["params"]}
    assert in_groups == {id(p) for n, p in model.named_parameters() if n in trained}


def test_frozen_batch_norm_keeps_its_statistics_and_names():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    freeze_parameters(model, ["backbone.norm.*"])
    assert isinstance(model.backbone.norm, FrozenBatchNorm2d)
    model.train()
    model.backbone(torch.rand(2, 3, 5, 5) * 9)
    after = model.state_dict()
    # detectron2's main branch keeps it.
    assert set(before) - set(after) <= {"backbone.norm.num_batches_tracked"}
    assert set(after) <= set(before)
    assert all(torch.equal(after[key], before[key]) for key in after)
    partly = net()
    freeze_parameters(partly, ["*.bias"])
    assert isinstance(partly.backbone.norm, nn.BatchNorm2d)


def test_a_pattern_that_fits_nothing_and_one_that_fits_everything_are_refused():
    with pytest.raises(UserError, match="'backbone', which fits no parameter; .* begin with backb"):
        freeze_parameters(net(), ["backbone"])
    with pytest.raises(UserError, match="leaves no parameter to train"):
        freeze_parameters(net(), ["*"])


def test_layer_wise_rates_by_prefix_and_by_pattern_the_longest_counts():
    model = net()
    factors = [["backbone.", 0.1], ["backbone.stem", 0.01], ["*.bias", 2.0], ["*_head.bias", 3.0]]
    groups = get_optimizer_params(model, 1.0, 0.0, lr_multipliers=factors)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    expected = {
        "backbone.stem.weight": 0.01,
        "backbone.stem.bias": 0.01,
        "backbone.norm.weight": 0.1,
        "backbone.norm.bias": 0.1,
        "backbone.res2.weight": 0.1,
        "backbone.res2.bias": 0.1,
        "box_head.weight": 1.0,
        "box_head.bias": 3.0,
        "mask_head.weight": 1.0,
        "mask_head.bias": 3.0,
    }
    assert {n: rates[id(p)] for n, p in model.named_parameters()} == expected
    with pytest.raises(UserError, match=r"'\*.neck.\*': no parameter name fits it"):
        get_optimizer_params(model, 1.0, 0.0, lr_multipliers=[["*.neck.*", 2.0]])
