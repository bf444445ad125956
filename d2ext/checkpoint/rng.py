"""The state of every random number generator a training run draws from."""

import contextlib
import logging
import random
from typing import Any

import numpy as np
import torch

from detectron2.utils import comm


def get_rng_state() -> dict[str, Any]:
    """State of the torch, CUDA, numpy and Python generators of this process.

    Only tensors and plain values, so that `torch.load(weights_only=True)` accepts it.
    """
    of_numpy: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = of_numpy
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `get_rng_state`; a CUDA state is ignored where there is no GPU."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserve_rng():
    """Leave all generators as they were: an evaluation in between must not change the training."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


class RNGState:
    """Checkpointable holding one generator state per process.

    `gather` is collective: every process calls it, then the main process saves.
    """

    def __init__(self):
        self._states: list[dict[str, Any]] = []

    def gather(self) -> None:
        """Collect the states of all processes on the main one."""
        self._states = comm.gather(get_rng_state())

    def state_dict(self) -> dict[str, Any]:
        return {"processes": self._states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this process's state, unless there were more or fewer processes then."""
        states = state["processes"]
        if len(states) != comm.get_world_size():
            logging.getLogger(__name__).warning(
                "random states are of %d processes, now there are %d: they are not restored",
                len(states),
                comm.get_world_size(),
            )
            return
        set_rng_state(states[comm.get_rank()])
