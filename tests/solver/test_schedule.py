"""Learning rates over the iterations, against detectron2's schedules and closed forms."""

import logging
import math

import pytest
import torch
from torch import nn

from d2ext.config import get_cfg
from d2ext.errors import UserError
from d2ext.solver import build_lr_multiplier, warmup_cosine, warmup_multistep
from d2ext.solver.schedule import make_lr_scheduler

from detectron2.engine import DefaultTrainer
from detectron2.solver import LRMultiplier


def optimizer(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    """Learning rate of each iteration, as the training loop sees it."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def run(multiplier, max_iter):
    return rates(make_lr_scheduler(optimizer(), multiplier, max_iter), max_iter)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    solver = cfg.SOLVER
    solver.MAX_ITER, solver.STEPS, solver.GAMMA, solver.BASE_LR = 40, (20, 30), 0.5, 0.3
    solver.WARMUP_ITERS, solver.WARMUP_FACTOR = 8, 0.1
    return cfg


@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
@pytest.mark.parametrize("warmup", [0, 8, 100])
def test_yaml_schedules_are_those_of_detectron2(cfg, method, name, warmup):
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_METHOD = name, method
    cfg.SOLVER.WARMUP_ITERS = warmup
    theirs = rates(DefaultTrainer.build_lr_scheduler(cfg, optimizer(0.3)), 40)
    ours = rates(make_lr_scheduler(optimizer(0.3), build_lr_multiplier(cfg), 40), 40)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_steps_multiply_the_rate_at_their_iteration():
    found = run(warmup_multistep(40, [20, 30], gamma=0.5, warmup_iters=4, warmup_factor=0.2), 40)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4:] == pytest.approx([1.0] * 16 + [0.5] * 10 + [0.25] * 10)


def test_the_cosine_ends_at_its_end_value():
    found = run(warmup_cosine(40, end=0.1, warmup_iters=0), 40)
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 40)) for i in range(40)]
    assert found == pytest.approx(expected)


def test_steps_past_the_end_are_ignored_with_a_line_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="d2ext.solver"):
        found = run(warmup_multistep(3, [2, 3, 60000], warmup_iters=0), 3)
    assert found == pytest.approx([1.0, 1.0, 0.1])
    assert "steps [3, 60000] lie past the end of training (3)" in caplog.text


def test_a_trial_run_of_one_iteration_works():
    assert len(run(warmup_multistep(1, [60000, 80000]), 1)) == 1
    assert len(run(warmup_cosine(1), 1)) == 1


def test_every_group_keeps_its_ratio_to_the_others():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 3.0)]
    several = torch.optim.SGD(groups, lr=1.0)
    scheduler = make_lr_scheduler(several, warmup_cosine(10, warmup_iters=3), 10)
    for _ in range(9):
        several.step()
        scheduler.step()
        small, large = (group["lr"] for group in several.param_groups)
        assert large == pytest.approx(3 * small)


def test_a_schedule_continues_from_its_state():
    multiplier = warmup_cosine(20, warmup_iters=5)
    whole = run(multiplier, 20)
    first = make_lr_scheduler(optimizer(), multiplier, 20)
    assert isinstance(first, LRMultiplier)
    start = rates(first, 7)
    second = make_lr_scheduler(optimizer(), multiplier, 20)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert start + rates(second, 13) == pytest.approx(whole)


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: warmup_cosine(0), "the number of iterations is 0, which leaves nothing to train"),
        (lambda: warmup_multistep(-1, []), "the number of iterations is -1"),
        (lambda: warmup_multistep(9, [5, 3]), r"steps \[5, 3\] are not ascending iterations"),
        (lambda: warmup_multistep(9, [3, 3]), r"steps \[3, 3\] are not ascending iterations"),
        (lambda: warmup_multistep(9, [0]), r"steps \[0\] are not ascending iterations"),
        (lambda: warmup_cosine(9, warmup_method="exp"), "warm-up method 'exp'; valid names: lin"),
    ],
)
def test_impossible_schedules_are_named_in_one_line(build, text):
    with pytest.raises(UserError, match=text):
        build()


def test_an_unknown_schedule_of_a_yaml_config_is_named_with_the_valid_ones(cfg):
    cfg.SOLVER.LR_SCHEDULER_NAME = "StepLR"
    with pytest.raises(UserError, match="is 'StepLR'; valid names: WarmupMultiStepLR, WarmupCos"):
        build_lr_multiplier(cfg)
