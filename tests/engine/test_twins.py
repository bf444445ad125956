"""The comparison of configs: what differs is named, in whichever part of a run it lies."""

import os

import pytest

from d2ext.data import get_dataset_records
from d2ext.engine import twins

from detectron2.data import DatasetCatalog, MetadataCatalog

LAZY = """
from d2ext.config import get_config

_base = get_config("mask_rcnn_tiny.py")
model, dataloader, optimizer = _base.model, _base.dataloader, _base.optimizer
lr_multiplier, train = _base.lr_multiplier, _base.train
"""


@pytest.fixture
def small_data(tmp_path):
    with twins.few_images(tmp_path / "datasets"):
        yield


@pytest.fixture
def pair(tmp_path):
    """Function: more lines of the yaml config -> stem of a pair that is else the same."""

    def write(lines=""):
        (tmp_path / "own.yaml").write_text(f"_BASE_: d2ext://mask_rcnn_tiny.yaml\n{lines}\n")
        (tmp_path / "own.py").write_text(LAZY)
        return str(tmp_path / "own")

    return write


def test_configs_that_agree_pass_all_checks(small_data, pair):
    for check in (*twins.CHECKS, twins.check_results):
        check(pair())


@pytest.mark.parametrize(
    ("check", "line", "words"),
    [
        (twins.check_settings, "SEED: 7", r"\.seed: 7 \| 42"),
        (twins.check_settings, "INPUT: {MIN_SIZE_TEST: 96}", "test_augmentations.0.*: 96 | 128"),
        (twins.check_loaders, "SOLVER: {IMS_PER_BATCH: 2}", r"batch_size: 2 \| 4"),
        (twins.check_loaders, "INPUT: {RANDOM_FLIP: none}", "augmentations"),
        (twins.check_network, "MODEL: {RPN: {NMS_THRESH: 0.6}}", r"nms_thresh: 0.6 \| 0.7"),
        (twins.check_network, "MODEL: {FPN: {OUT_CHANNELS: 32}}", "other names or shapes"),
        (twins.check_network, "SOLVER: {WEIGHT_DECAY: 0.5}", r"weight_decay: 0.5 \| "),
        (twins.check_network, "SOLVER: {WARMUP_ITERS: 10}", "Not equal"),
        (twins.check_results, "MODEL: {RPN: {LOSS_WEIGHT: 2.0}}", "loss_rpn_cls"),
        (twins.check_results, "TEST: {DETECTIONS_PER_IMAGE: 3}", "not the same number"),
    ],
)
def test_a_difference_is_named(small_data, pair, check, line, words):
    with pytest.raises(AssertionError, match=words):
        check(pair(line))


def test_a_missing_twin_is_named(pair, tmp_path):
    stem = pair()
    (tmp_path / "Base-own.yaml").touch()  # needs none
    assert twins.config_stems(tmp_path) == [stem]
    (tmp_path / "other.yaml").touch()
    with pytest.raises(AssertionError, match=r"other has no twin ending in \.py"):
        twins.config_stems(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssertionError, match="has no configs"):
        twins.config_stems(tmp_path / "empty")


def test_few_images_are_there_for_a_while_only(tmp_path):
    def state():
        return dict(DatasetCatalog.data), dict(MetadataCatalog.data), dict(os.environ)

    before = state()
    with twins.few_images(tmp_path, num_images=3):
        assert len(get_dataset_records("shapes_train")) == 3
        assert len(DatasetCatalog.get("coco_2017_val")) == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["shapes"]
    assert state() == before
