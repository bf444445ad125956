"""dev/write_config_reference.py: docs/config_reference.md has every key as the code has it."""

import inspect
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from d2ext.config import get_cfg, load_config

from detectron2.utils.registry import locate

from tests.config.test_options import added_keys

ROOT = Path(__file__).resolve().parents[2]


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def rows():
    text = (ROOT / "docs/config_reference.md").read_text(encoding="utf-8")
    return [cells(line) for line in text.splitlines() if line.startswith("| `")]


def test_the_page_is_what_the_code_says(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), (
        "run python dev/write_config_reference.py"
    )


def test_every_own_key_is_in_it_once():
    keys = [row[0].strip("`") for row in rows()]
    assert len(keys) == len(set(keys))
    assert set(added_keys()) <= set(keys)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("`"))
def test_every_key_has_a_default_a_meaning_and_a_lazy_name(row):
    key, lazy, default, meaning, _ = row
    node = get_cfg()
    for part in key.strip("`").split("."):
        node = node[part]
    assert default in (f"`{node!r}`", "`cuda`, or `cpu` where there is no GPU")
    assert len(meaning) > 10 and "`" in lazy


@pytest.fixture(scope="module")
def lazy_configs():
    paths = [*ROOT.glob("configs/*_tiny_finetune.py"), *ROOT.glob("projects/*/configs/*_tiny.py")]
    paths += ROOT.glob("projects/*/configs/*_R_50_coco.py")
    paths.append(ROOT / "configs/mask_rcnn_tiny_convnext.py")
    found = [load_config(path) for path in paths]
    assert len(found) >= 6
    return found


def has(config, name):
    node = config
    *groups, last = name.replace(".N.", ".0.").split(".")
    for part in groups:
        node = node[int(part)] if OmegaConf.is_list(node) else node.get(part)
        if node is None:
            return False
    if OmegaConf.is_list(node):
        return last.isdigit() and int(last) < len(node)
    return last in node or ("_target_" in node and last in arguments(node["_target_"]))


def arguments(target):
    """Names that a class or function takes, given as in a lazy config."""
    return inspect.signature(locate(target) if isinstance(target, str) else target).parameters


@pytest.mark.parametrize(
    "name",
    sorted({n for row in rows() for n in re.findall(r"`([a-z_]+(?:\.\w+)+)`", row[1])}),
)
def test_every_lazy_name_is_one_of_a_shipped_config(name, lazy_configs):
    assert any(has(config, name) for config in lazy_configs), f"no lazy config has {name}"


def test_comments_of_assignments_that_follow_each_other_are_shared(script):
    found = script.explained(script.add_augmentation_config)
    assert found["INPUT.LSJ.MIN_SCALE"] == found["INPUT.LSJ.MAX_SCALE"] != ""
    assert found["INPUT.COLOR_JITTER.HUE"] != found["INPUT.COLOR_JITTER.SATURATION"]
