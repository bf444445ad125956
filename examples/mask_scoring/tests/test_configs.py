"""Yaml and lazy configs of one name describe the same run."""

from pathlib import Path

import pytest

import mask_scoring
from d2ext.engine import twins

STEMS = twins.config_stems(Path(mask_scoring.__file__).parent / "configs")


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("check", twins.CHECKS)
@pytest.mark.parametrize("stem", STEMS)
def test_yaml_and_lazy_config_describe_the_same_run(small_data, stem, check):
    check(stem)


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem.endswith("_tiny")])
def test_tiny_configs_compute_the_same_losses_step_and_detections(small_data, stem):
    twins.check_results(stem)


def test_the_readme_lists_every_config():
    readme = Path(__file__).parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert all(f"| `{Path(stem).name}` |" in text for stem in STEMS)
