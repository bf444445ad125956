"""Every fault of the table has the outcome that it has to have."""

import re

import pytest

from tests.soak.conftest import FULL
from tests.soak.faults import FAULTS
from tests.soak.scene import Scene

CASES = [(area, *fault) for area, faults in FAULTS.items() for fault in faults]
# Those of runs take several trainings each; `tests/engine` has the like of them.
SHORT = [case for case in CASES if case[0] != "Runs"]


@pytest.mark.parametrize("case", CASES if FULL else SHORT, ids=lambda case: f"{case[0]}: {case[1]}")
def test_fault(case, few_images, mask_rcnn_weights, tmp_path, monkeypatch, counted, message):
    area, what, expected, words, provoke = case
    monkeypatch.chdir(tmp_path)
    observed = provoke(Scene(tmp_path, few_images, mask_rcnn_weights))
    assert re.search(words, observed, re.IGNORECASE), f"{what}: {observed}"
    if expected.startswith("refused"):
        assert not observed.startswith("exit 0") and "Traceback" not in observed
    record = {"area": area, "what": what, "expected": expected, "observed": observed}
    if case in SHORT and expected.startswith("refused"):
        message(area, what, observed)
        record["mistake"] = observed
    counted({"number": CASES.index(case), **record})


def test_the_table_has_at_least_sixty_faults_and_each_once():
    assert len({(area, what) for area, what, *_ in CASES}) == len(CASES) >= 60
