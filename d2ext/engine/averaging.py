"""An exponential moving average of the weights, which is evaluated and kept in their place."""

import logging
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detectron2.engine import HookBase

KEY = "ema"  # in checkpoints
logger = logging.getLogger(__name__)


class WeightAverage(HookBase):
    """Averages the weights after every step, by torch's `AveragedModel`.

    The decay grows from 0.1 to its value as (1 + n) / (10 + n) after n steps, the rule of
    TensorFlow's `ExponentialMovingAverage`, so that short trainings do not keep their first
    weights. Buffers, which hold the statistics of batch norm, are averaged with the weights, as in
    torchvision's reference training; those that are no floating point numbers are copied.

    A checkpoint has the average under `model`, where everybody looks for weights, and what is
    needed to go on under `ema`: `trained`, the weights of the optimiser, and the number of steps.

    Args:
        model: not wrapped in DDP; every process averages its own, which are the same.
        decay: between 0 and 1.

    Attributes:
        averaged: a module like `model`.
        continued: whether it goes on from a checkpoint.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        rule: Any = _Rule(decay)
        self._average = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
        self._average.requires_grad_(False).eval()
        self.continued = False

    @property
    def averaged(self) -> nn.Module:
        return self._average.module

    def after_step(self):
        self._average.update_parameters(self._model)

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has under `model`."""
        return self.averaged.state_dict()

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint has under `ema`."""
        return {"trained": self._model.state_dict(), "steps": int(self._average.n_averaged)}

    def begin(self) -> None:
        """Start from the present weights of the model."""
        self.averaged.load_state_dict(self._model.state_dict())

    def resume(self, state: dict[str, Any]) -> None:
        """Continue, after the average of a checkpoint was loaded into the model.

        Args:
            state: what the checkpoint has under `ema`.
        """
        self.begin()
        self._model.load_state_dict(state["trained"])
        self._average.n_averaged.fill_(state["steps"])
        self.continued = True


class AverageState:
    """Checkpointable of a `WeightAverage`; its name in the file is `ema`."""

    def __init__(self, average: WeightAverage):
        self._average = average

    def state_dict(self) -> dict[str, Any]:
        return self._average.checkpoint_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.resume(state)


def resume_average(
    average: WeightAverage | None, model: nn.Module, rest: dict[str, Any], source: str
) -> None:
    """Go on with or without an average where the checkpoint has it otherwise.

    Args:
        average: of this run, if it has one.
        model: with the weights of the checkpoint, which are an average if that run had one.
        rest: what the checkpoint has that nobody took.
        source: name of the checkpoint, for messages.
    """
    if average is None and KEY in rest:
        getattr(model, "module", model).load_state_dict(rest[KEY]["trained"])
        logger.warning(
            "'%s' has an average of the weights, which ends: SOLVER.EMA_DECAY is 0 now, "
            "train.ema_decay in lazy configs",
            source,
        )
    elif average is not None and not average.continued:
        average.begin()
        logger.warning("'%s' has no average of the weights: it starts here", source)


class _Rule:
    """`get_ema_multi_avg_fn` with a decay that grows."""

    def __init__(self, decay: float):
        self._decay = decay

    @torch.no_grad()
    def __call__(self, averaged: list, current: list, steps: torch.Tensor) -> None:
        if not averaged[0].is_floating_point():
            for old, new in zip(averaged, current):
                old.copy_(new)
            return
        n = int(steps)
        get_ema_multi_avg_fn(min(self._decay, (1 + n) / (10 + n)))(averaged, current, steps)
