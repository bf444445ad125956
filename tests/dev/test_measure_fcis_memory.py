"""tools/measure_fcis_memory.py on a network that takes no time."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--config-file", str(ROOT / "projects/FCIS/configs/fcis_tiny.yaml"), "--size", "64", "96"]


@pytest.fixture
def measure(monkeypatch, capsys):
    """What a part of the tool prints, read from its JSON."""
    path = ROOT / "tools" / "measure_fcis_memory.py"
    spec = importlib.util.spec_from_file_location("measure_fcis_memory", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(part):
        arguments = [*TINY, "--regions", "20", "--objects", "3", "--part", part]
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        tool.main()
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
