"""Seeding of the global random generators for the length of a `with` block."""

import contextlib
import random

import numpy as np
import torch


@contextlib.contextmanager
def seeded_generators(seed):
    """Seed Python's, numpy's and torch's CPU generator, and restore their states at the end.

    detectron2's augmentations draw from numpy's global generator; user augmentations may use any of
    the three. CUDA generators are left alone, as the block may run in a forked worker.

    Args:
        seed: non-negative, at most 64 bit; None leaves all generators as they are.
    """
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
