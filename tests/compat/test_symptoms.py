"""What detectron2 v0.6 does wrong on this stack, and that nothing of it is left behind d2ext."""

import json
import re
import sys
from pathlib import Path

import pytest

import detectron2

SCENARIOS = Path(__file__).with_name("scenarios.py")
NO_BOOL = r"AttributeError: module 'numpy' has no attribute 'bool'"
# Scenario -> error of v0.6, which ends at the text's end or goes on with advice.
SYMPTOMS = {
    "layers": r"ImportError: cannot import name '_C' from 'detectron2'",
    "environment_report": r"AttributeError: .*has no attribute 'get_compiler_version'",
    "transforms": r"AttributeError: module 'PIL.Image' has no attribute 'LINEAR'",
    "mapper_returns_none": r"TypeError: Population must be a sequence",
    "class_histogram": r"AssertionError: no table of classes in the log",
    "pascal_voc_ids": r"AttributeError: module 'numpy' has no attribute 'str'",
    "semantic_evaluation": r"AttributeError: module 'numpy' has no attribute 'int'",
    "polygon_masks": NO_BOOL,
    "panoptic_masks": NO_BOOL,
    "video_colors": NO_BOOL,
    "pascal_voc_evaluation": NO_BOOL,
}
ADAPTATIONS = {
    "stub_extension",
    "pillow_linear",
    "map_dataset_sampling",
    "class_histogram",
    "pascal_voc_ids",
    "sem_seg_evaluation",
    "pascal_voc_evaluation",
    "mask_structures",
    "visualizer",
    "video_visualizer",
}
if sys.version_info < (3, 11):  # random.sample still takes sets
    del SYMPTOMS["mapper_returns_none"]
    ADAPTATIONS.remove("map_dataset_sampling")


def is_old_release():
    """v0.6 reads its own extension without a guard; upstream main does not."""
    source = Path(detectron2.__file__).with_name("layers") / "rotated_boxes.py"
    return re.search(r"(?m)^from detectron2 import _C\b", source.read_text()) is not None


OLD = is_old_release()


def outcomes(run_python, mode):
    process = run_python("-W", "ignore", SCENARIOS, mode)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bare(run_python):
    return outcomes(run_python, "bare")


@pytest.fixture(scope="module")
def adapted(run_python):
    return outcomes(run_python, "adapted")


@pytest.mark.parametrize("scenario", SYMPTOMS)
def test_scenario_fails_in_plain_v06_and_works_behind_d2ext(scenario, bare, adapted):
    if OLD:
        assert re.match(SYMPTOMS[scenario], bare[scenario])
    assert adapted[scenario] == "works"


def test_everything_is_adapted_in_v06_and_nothing_in_newer_versions(adapted):
    assert set(adapted["applied"]) == (ADAPTATIONS if OLD else set())
    assert len(adapted["applied"]) == len(set(adapted["applied"]))


def test_importing_d2ext_applies_the_cheap_half_and_loads_three_small_modules(adapted):
    assert adapted["applied on import"] == (["stub_extension", "pillow_linear"] if OLD else [])
    loaded = set(adapted["detectron2 modules on import"]) - {"detectron2._C"}
    assert loaded == {"detectron2", "detectron2.utils", "detectron2.utils.env"}


def test_the_default_coco_evaluation_needs_the_extension_and_the_chosen_one_does_not(adapted):
    assert adapted["chosen_coco_evaluation"] == "works"
    assert adapted["compiled"] == (not OLD and adapted["compiled"])
    if OLD:
        message = "detectron2._C.InstanceAnnotation needs a compiled detectron2"
        assert adapted["default_coco_evaluation"] == f"NotImplementedError: {message}"


def test_numpy_itself_keeps_lacking_the_old_names(adapted):
    assert not adapted["numpy has int"]
