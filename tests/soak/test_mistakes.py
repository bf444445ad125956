"""Every mistake of the table ends in one line, the one that docs/errors.md shows."""

import re

import pytest

from tests.soak.faults import FAULTS
from tests.soak.mistakes import MISTAKES
from tests.soak.scene import Scene

CASES = [(area, *mistake) for area, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def test_mistake(case, few_images, mask_rcnn_weights, tmp_path, monkeypatch, counted, message):
    area, what, words, provoke = case
    monkeypatch.chdir(tmp_path)
    observed = provoke(Scene(tmp_path, few_images, mask_rcnn_weights))
    assert not observed.startswith("exit 0") and "Traceback" not in observed
    assert re.search(words, observed), f"{what}: {observed}"
    counted({"number": CASES.index(case), "area": area, "what": what, "mistake": observed})
    message(area, what, observed)


def test_the_table_has_each_mistake_once():
    assert len({(area, what) for area, what, *_ in CASES}) == len(CASES) >= 60
    assert not set(MISTAKES) & set(FAULTS)
