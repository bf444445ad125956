"""Learning rate schedules: warm-up, then steps or half a cosine, always through `LRMultiplier`.

detectron2's own multiplier is the only scheduler that both of its versions save and restore with a
checkpoint, so nothing else is used.
"""

import logging
from collections.abc import Sequence

import torch
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler


def warmup_multistep(
    max_iter: int,
    milestones: Sequence[int],
    gamma: float = 0.1,
    warmup_iters: int = 1000,
    warmup_factor: float = 0.001,
    warmup_method: str = "linear",
) -> ParamScheduler:
    """Multiply the learning rate by `gamma` at each milestone, in iterations.

    Milestones past the end are ignored, so that a short trial run of a long config works.

    Raises:
        UserError: `max_iter` is not positive, milestones are not ascending, or the name of the
            warm-up is unknown.
    """
    _check_length(max_iter)
    if list(milestones) != sorted({step for step in milestones if step > 0}):
        raise UserError(f"learning rate steps {list(milestones)} are not ascending iterations")
    steps = [int(step) for step in milestones if step < max_iter]
    if len(steps) < len(milestones):
        logging.getLogger(__name__).info(
            "learning rate steps %s lie past the end of training (%d) and are ignored",
            [int(s) for s in milestones if s >= max_iter],
            max_iter,
        )
    schedule = MultiStepParamScheduler(
        values=[gamma**k for k in range(len(steps) + 1)], milestones=steps, num_updates=max_iter
    )
    return _with_warmup(schedule, max_iter, warmup_iters, warmup_factor, warmup_method)


def warmup_cosine(
    max_iter: int,
    end: float = 0.0,
    warmup_iters: int = 1000,
    warmup_factor: float = 0.001,
    warmup_method: str = "linear",
) -> ParamScheduler:
    """Half a cosine from 1 down to `end`.

    Raises:
        UserError: `max_iter` is not positive, or the name of the warm-up is unknown.
    """
    _check_length(max_iter)
    schedule = CosineParamScheduler(1.0, end)
    return _with_warmup(schedule, max_iter, warmup_iters, warmup_factor, warmup_method)


def _check_length(max_iter: int) -> None:
    if max_iter < 1:
        raise UserError(
            f"the number of iterations is {max_iter}, which leaves nothing to train; "
            "set SOLVER.MAX_ITER (yaml) or train.max_iter (lazy)"
        )


def _with_warmup(schedule, max_iter, warmup_iters, warmup_factor, warmup_method) -> ParamScheduler:
    if warmup_method not in ("linear", "constant"):
        raise UserError(f"warm-up method '{warmup_method}'; valid names: linear, constant")
    length = min(warmup_iters / max_iter, 1.0)
    return WarmupParamScheduler(schedule, warmup_factor, length, warmup_method)


def build_lr_multiplier(cfg: CfgNode) -> ParamScheduler:
    """The schedule of a yaml config (`SOLVER.LR_SCHEDULER_NAME`)."""
    solver = cfg.SOLVER
    common = dict(
        max_iter=solver.MAX_ITER,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_method=solver.WARMUP_METHOD,
    )
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        return warmup_multistep(milestones=solver.STEPS, gamma=solver.GAMMA, **common)
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return warmup_cosine(end=solver.COSINE_END, **common)
    raise UserError(
        f"SOLVER.LR_SCHEDULER_NAME is '{solver.LR_SCHEDULER_NAME}'; "
        "valid names: WarmupMultiStepLR, WarmupCosineLR"
    )


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, multiplier: ParamScheduler, max_iter: int
) -> LRMultiplier:
    """Attach a multiplier to an optimiser."""
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=max_iter)
