"""No option without a user: every yaml key that this collection adds is set by a shipped config, or
is a switch in a table of a README or of docs/ and named in a test that shows its effect."""

import re
from pathlib import Path

import pytest
import yaml

from d2ext.config import add_d2ext_config, add_modeling_config, load_projects
from d2ext.config.projects import config_functions

from detectron2.config import get_cfg as detectron2_cfg

ROOT = Path(__file__).resolve().parents[2]


def flat(cfg, prefix=""):
    """Full names of the leaves of nested dicts."""
    names = []
    for key, value in cfg.items():
        names += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def added_keys():
    """Those of d2ext and of the projects in this repository."""
    load_projects()
    cfg = detectron2_cfg()
    projects = [f for f in config_functions() if f.__module__.startswith("d2ext.projects.")]
    for function in (add_d2ext_config, add_modeling_config, *projects):
        function(cfg)
    return sorted(set(flat(cfg)) - set(flat(detectron2_cfg())))


def set_by_configs():
    names = set()
    for path in [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")]:
        names.update(flat(yaml.safe_load(path.read_text()) or {}))
    return names


def rows_of_tables():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("projects/*/README.md")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    return [line for line in lines if line.startswith("|")]


SET, ROWS = set_by_configs(), rows_of_tables()
TESTS = "\n".join(p.read_text() for p in ROOT.glob("tests/**/test_*.py") if p != Path(__file__))


def in_a_table(key):
    # Tables of a project leave out MODEL.<PROJECT>.
    names = {key, re.sub(r"^MODEL\.[A-Z]+\.", "", key)}
    return any(f"`{name}`" in row for name in names for row in ROWS)


def test_the_keys_are_found():
    keys = added_keys()
    assert {"MODEL.MNC.NUM_STAGES", "SOLVER.OPTIMIZER", "LOG_PERIOD"} <= set(keys)
    assert len(keys) > 40


@pytest.mark.parametrize("key", added_keys())
def test_every_key_has_a_user(key):
    last = key.rsplit(".", 1)[-1]
    tested = re.search(rf"\b{last}\b", TESTS) is not None
    assert key in SET or (in_a_table(key) and tested), f"{key}: no shipped config sets it, and " + (
        "no test names it" if in_a_table(key) else "no table explains it"
    )
