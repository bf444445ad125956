"""dev/measure_fcis_memory.py on a network that takes no time."""

import json
import math
import mmap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--config-file", str(ROOT / "projects/FCIS/configs/fcis_tiny.yaml"), "--size", "64", "96"]


@pytest.fixture
def measure(script, capsys):
    """What a part of the tool prints, read from its JSON."""

    def run(part):
        script.main([*TINY, "--regions", "20", "--objects", "3", "--part", part])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_a_training_step_has_the_regions_asked_for(measure):
    found = measure("network")
    assert found["regions"] == 20 + 3
    assert len(found["losses"]) == 5 and all(map(math.isfinite, found["losses"].values()))
    assert 0 < found["before"] <= found["peak"]


@pytest.mark.parametrize("part", ["fused", "assembled"])
def test_the_head_is_measured_alone(measure, part):
    found = measure(part)
    assert 0 < found["before"] <= found["peak"] and found["seconds"] > 0


def test_memory_that_is_given_back_counts_for_the_peak(script):
    size = 64 * 2**20

    def use():
        # Pages of the system: an allocator may have such a block at hand.
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1

    found = script.peak_of(use)
    assert found["peak"] - found["before"] == pytest.approx(size / 2**30, rel=0.1)


def test_the_peak_of_a_step_that_only_frees_memory_is_its_start(script):
    for size in range(1000, 200_000, 5000):
        held = [np.ones(size) for _ in range(8)]
        found = script.peak_of(held.clear)
        assert found["before"] <= found["peak"] < found["before"] + 1 / 1024
