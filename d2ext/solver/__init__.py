"""Optimisers and learning rate schedules, built the same way from yaml and from lazy configs."""

from d2ext import compat

compat.require_detectron2()

from d2ext.solver.freezing import freeze_parameters
from d2ext.solver.optimizer import build_optimizer, get_optimizer_params, make_optimizer
from d2ext.solver.schedule import build_lr_multiplier, warmup_cosine, warmup_multistep

__all__ = [
    "build_lr_multiplier",
    "build_optimizer",
    "freeze_parameters",
    "get_optimizer_params",
    "make_optimizer",
    "warmup_cosine",
    "warmup_multistep",
]
