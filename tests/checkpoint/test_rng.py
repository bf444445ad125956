"""Saving and restoring the random generators."""

import logging
import random

import numpy as np
import pytest
import torch

from d2ext.checkpoint import RNGState, preserve_rng
from d2ext.checkpoint.rng import get_rng_state, set_rng_state

from detectron2.utils import comm


def draw():
    """Numbers from every generator; the normal ones leave half of a pair in the generators."""
    return [
        *torch.rand(3).tolist(),
        *torch.randn(3).tolist(),
        *np.random.rand(3).tolist(),
        *np.random.randn(3).tolist(),
        *(random.random() for _ in range(3)),
        *(random.gauss(0, 1) for _ in range(3)),
        *torch.randperm(5).tolist(),
    ]


def test_streams_continue_as_if_they_had_not_been_interrupted(tmp_path):
    draw()
    torch.save(get_rng_state(), tmp_path / "state.pth")
    expected = draw() + draw()
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    assert draw() != expected[: len(expected) // 2]
    set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() + draw() == expected


def test_a_block_leaves_the_generators_as_they_were():
    state = get_rng_state()
    expected = draw()
    set_rng_state(state)
    with preserve_rng():
        draw()
    assert draw() == expected
    set_rng_state(state)
    with pytest.raises(RuntimeError), preserve_rng():
        draw()
        raise RuntimeError
    assert draw() == expected


def test_the_checkpointable_holds_the_state_at_the_time_of_gathering():
    rng = RNGState()
    rng.gather()
    state = rng.state_dict()
    expected = draw()
    RNGState().load_state_dict(state)
    assert draw() == expected


def processes(monkeypatch, rank, count):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: count)


def test_every_process_gets_its_own_state(monkeypatch):
    states, expected = [], []
    for _ in range(2):
        states.append(get_rng_state())
        expected.append(draw())
    for rank in range(2):
        processes(monkeypatch, rank, 2)
        RNGState().load_state_dict({"processes": states})
        assert draw() == expected[rank]


@pytest.mark.parametrize("count", [1, 3])
def test_states_of_another_number_of_processes_are_left_out_with_a_warning(
    monkeypatch, caplog, count
):
    states = [get_rng_state(), get_rng_state()]
    before = get_rng_state()
    expected = draw()
    set_rng_state(before)
    processes(monkeypatch, 0, count)
    with caplog.at_level(logging.WARNING, logger="d2ext.checkpoint"):
        torch.rand(1)
        RNGState().load_state_dict({"processes": states})
    assert draw() != expected
    assert f"random states are of 2 processes, now there are {count}" in caplog.text
