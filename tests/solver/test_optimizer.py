"""Parameter groups, optimisers and gradient clipping from both kinds of config."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from d2ext.config import get_cfg
from d2ext.errors import UserError
from d2ext.solver import build_optimizer, get_optimizer_params, make_optimizer
from d2ext.solver.optimizer import OPTIMIZERS

from detectron2.config import LazyCall, instantiate
from detectron2.config import get_cfg as get_plain_cfg
from detectron2.engine import DefaultTrainer


class Net(nn.Module):
    """Convolutions with a norm, a frozen layer and two heads with similar names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 2)
        self.head_new = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 2)
        self.frozen.requires_grad_(False)
        self.shared = self.head


@pytest.fixture
def net():
    return Net()


def settings(optimizer_or_groups, net, *names):
    """{parameter name: values of the named settings}."""
    groups = getattr(optimizer_or_groups, "param_groups", optimizer_or_groups)
    names_of = {p: n for n, p in net.named_parameters()}
    found = [(names_of[p], tuple(g[n] for n in names)) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_every_trained_parameter_is_in_one_group_and_equal_settings_share_it(net):
    groups = get_optimizer_params(net, base_lr=0.1, weight_decay=0.01)
    assert len(groups) == 1
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert set(settings(groups, net, "lr")) == trained


def test_weight_decay_of_norms_and_biases_and_learning_rate_of_biases(net):
    groups = get_optimizer_params(
        net,
        base_lr=0.1,
        weight_decay=0.01,
        weight_decay_norm=0.0,
        weight_decay_bias=0.5,
        bias_lr_factor=2.0,
    )
    found = settings(groups, net, "lr", "weight_decay")
    assert found["stem.weight"] == (0.1, 0.01)
    assert found["norm.weight"] == (0.1, 0.0)
    assert found["stem.bias"] == found["norm.bias"] == (0.2, 0.5)


@pytest.mark.parametrize("lazy", [False, True])
def test_the_longest_prefix_decides_the_learning_rate_factor(net, lazy):
    pairs = [["head", 3.0], ["head_new", 5], ["head.bias", 0.0]]
    groups = get_optimizer_params(
        net, 0.1, 0.01, lr_multipliers=OmegaConf.create(pairs) if lazy else dict(pairs)
    )
    found = {n: v for n, (v,) in settings(groups, net, "lr").items()}
    assert found["head_new.weight"] == found["head_new.bias"] == pytest.approx(0.5)
    assert found["head.weight"] == pytest.approx(0.3)
    assert found["head.bias"] == 0
    assert found["stem.weight"] == found["norm.bias"] == 0.1


def test_a_prefix_without_parameters_and_a_malformed_list_are_errors(net):
    with pytest.raises(UserError, match="multiplier for 'heads': no parameter name starts with"):
        get_optimizer_params(net, 0.1, 0.01, lr_multipliers=[("heads", 2.0)])
    for wrong in (["head"], [["head", "fast"]], 3, [["head", 1, 2]]):
        with pytest.raises(UserError, match=r"are \[\[prefix, factor\], ...\], not"):
            get_optimizer_params(net, 0.1, 0.01, lr_multipliers=wrong)


def test_the_default_groups_of_a_yaml_config_are_those_of_detectron2(net):
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BIAS_LR_FACTOR = 0.3, 2.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS, cfg.SOLVER.NESTEROV = 0.2, True
    names = ("lr", "weight_decay", "momentum", "nesterov")
    ours, theirs = build_optimizer(cfg, net), DefaultTrainer.build_optimizer(cfg, net)
    assert settings(ours, net, *names) == settings(theirs, net, *names)
    assert type(ours) is torch.optim.SGD


def test_adamw_from_yaml_has_its_own_defaults(net):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = "AdamW", 0.001, 0.05
    optimizer = build_optimizer(cfg, net)
    assert type(optimizer) is torch.optim.AdamW
    found = settings(optimizer, net, "lr", "weight_decay", "betas")
    assert found["head.weight"] == (0.001, 0.05, (0.9, 0.999))
    assert found["norm.weight"] == (0.001, 0.0, (0.9, 0.999))


def test_lists_of_a_lazy_config_become_plain_values_in_the_state(net, tmp_path):
    node = LazyCall(make_optimizer)(name="AdamW", lr=0.01, betas=[0.8, 0.9])
    node.model = net
    optimizer = instantiate(node)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    torch.save(optimizer.state_dict(), tmp_path / "state.pth")
    torch.load(tmp_path / "state.pth", weights_only=True)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(name="Adagrad"), "unknown optimizer 'Adagrad'; valid names: SGD, AdamW"),
        (dict(name="AdamW", momentum=0.9), "optimizer AdamW has no option 'momentum'"),
        (dict(lr=-1.0), "the learning rate is -1.0"),
        (dict(lr=None), "the learning rate is None"),
        (dict(lr=float("nan")), "the learning rate is nan"),
        (dict(clip_gradients={"type": "norms"}), "gradient clipping type 'norms'; valid: norm, "),
        (dict(clip_gradients={"max_norm": 1}), "gradient clipping has no option 'max_norm'"),
    ],
)
def test_mistakes_are_named_in_one_line(net, options, text):
    with pytest.raises(UserError) as error:
        make_optimizer(net, **options)
    assert text in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# clipping: a plain SGD step of size 1 moves each parameter by its clipped gradient


def step_with(clip, gradients, name="SGD"):
    model = nn.ParameterList(nn.Parameter(torch.zeros(len(g))) for g in gradients)
    options = {"momentum": 0.0} if name == "SGD" else {}
    optimizer = make_optimizer(
        model, name=name, lr=1.0, weight_decay=0.0, clip_gradients=clip, **options
    )
    for parameter, gradient in zip(model, gradients):
        parameter.grad = torch.tensor(gradient)
    optimizer.step()
    return [parameter.grad.tolist() for parameter in model], [-p.detach() for p in model]


GRADIENTS = [[3.0, 4.0], [12.0]]


@pytest.mark.parametrize(
    "clip, expected",
    [
        (None, [[3.0, 4.0], [12.0]]),
        ({"type": "value", "value": 3.5}, [[3.0, 3.5], [3.5]]),
        ({"type": "norm", "value": 1.0}, [[0.6, 0.8], [1.0]]),
        ({"type": "norm", "value": 2.0, "norm_type": 1.0}, [[6 / 7, 8 / 7], [2.0]]),
        ({"value": 100.0}, [[3.0, 4.0], [12.0]]),
        ({"type": "full_model", "value": 1.3}, [[0.3, 0.4], [1.2]]),
        ({"type": "full_model", "value": 19.0, "norm_type": 1.0}, [[3.0, 4.0], [12.0]]),
    ],
)
def test_gradients_are_clipped_before_the_step(clip, expected):
    gradients, moved = step_with(clip, GRADIENTS)
    for gradient, change, wanted in zip(gradients, moved, expected):
        assert gradient == pytest.approx(wanted, abs=1e-5)
        assert change.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_every_optimiser_clips_from_yaml_and_from_lazy_configs_alike(name, kind):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = name, 1.0
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = True, kind, 2.0, 1.0
    model = nn.ParameterList(nn.Parameter(torch.zeros(len(g))) for g in GRADIENTS)
    optimizer = build_optimizer(cfg, model)
    for parameter, gradient in zip(model, GRADIENTS):
        parameter.grad = torch.tensor(gradient)
    optimizer.step()
    lazy = OmegaConf.create({"type": kind, "value": 2.0, "norm_type": 1.0})
    expected, _ = step_with(lazy, GRADIENTS, name)
    assert [p.grad.tolist() for p in model] == expected != GRADIENTS


def test_a_clipping_optimiser_restores_its_state():
    def make():
        parameter = nn.Parameter(torch.ones(2))
        model = nn.ParameterList([parameter])
        clip = {"type": "full_model", "value": 1.0}
        return parameter, make_optimizer(model, lr=0.1, clip_gradients=clip)

    def step(parameter, optimizer):
        parameter.grad = torch.tensor([3.0, 4.0])
        optimizer.step()

    parameter, optimizer = make()
    step(parameter, optimizer)
    other, restored = make()
    other.data.copy_(parameter)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(parameter, optimizer)
    step(other, restored)
    assert other.equal(parameter)


def test_detectron2s_own_trainer_says_what_only_our_loop_does(caplog):
    cfg = get_cfg()
    DefaultTrainer.build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert not caplog.text
    cfg.INPUT.COPY_PASTE.PROB, cfg.SOLVER.EMA_DECAY = 0.5, 0.9
    DefaultTrainer.build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert "INPUT.COPY_PASTE.PROB, SOLVER.EMA_DECAY: what d2ext.engine does" in caplog.text
    caplog.clear()
    plain = get_plain_cfg()  # has none of these keys
    DefaultTrainer.build_optimizer(plain, torch.nn.Linear(2, 2))
    assert not caplog.text


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("OPTIMIZER", "AdamW", "SOLVER.OPTIMIZER=AdamW has no effect"),
        ("LR_MULTIPLIERS", [["", 2.0]], "SOLVER.LR_MULTIPLIERS has no effect"),
        ("OPTIMIZER", "SGD", ""),
    ],
)
def test_detectron2s_own_trainer_says_which_keys_it_leaves_out(caplog, key, value, words):
    cfg = get_cfg()
    cfg.SOLVER[key] = value
    optimizer = DefaultTrainer.build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)
    assert words in caplog.text and bool(caplog.text) == bool(words)
