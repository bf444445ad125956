"""The best checkpoint, and the end of a training that no longer improves."""

import json

import pytest
import torch

from d2ext.engine import loop, train
from d2ext.engine.best import BestCheckpoint
from d2ext.errors import UserError

KEYS = {
    "yaml": ("TEST.BEST_METRIC=segm/AP", "TEST.EARLY_STOPPING={}"),
    "py": ("train.best_metric=segm/AP", "train.early_stopping={}"),
}


@pytest.fixture
def scored(short_run, shapes_few, monkeypatch):
    """Function: train with given results of the evaluations; an exception is raised instead."""

    def run(kind, values, patience=0, resume=False):
        values = iter(values)

        def evaluate(experiment, model):
            value = next(values)
            if isinstance(value, Exception):
                raise value
            return {"segm": {"AP": value}}

        monkeypatch.setattr(loop, "evaluate", evaluate)
        metric, stopping = KEYS[kind]
        options = [metric, stopping.format(patience), f"DATASETS.TEST={shapes_few}"]
        return train(short_run("mask_rcnn", kind, "run", *options, "TEST.EVAL_PERIOD=1"), resume)

    return run


def iteration_of(path):
    return torch.load(path, weights_only=True)["iteration"]


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_the_weights_of_the_best_evaluation_are_kept(scored, tmp_path, kind):
    scored(kind, [1.0, 5.0, float("nan"), 5.0, 3.0, 2.0])
    best = torch.load(tmp_path / "run/model_best.pth", weights_only=True)
    assert best["iteration"] == 1 and best["best"] == 5.0
    same = torch.load(tmp_path / "run/model_0000001.pth", weights_only=True)["model"]
    assert all(torch.equal(best["model"][key], same[key]) for key in same)
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_final.pth"


def test_the_last_evaluation_may_be_the_best(scored, tmp_path):
    scored("yaml", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert iteration_of(tmp_path / "run/model_best.pth") == 5


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_training_ends_when_the_metric_no_longer_improves(scored, tmp_path, kind):
    results = scored(kind, [1.0, 4.0, 3.0, 4.0], patience=2)
    assert results == {"segm": {"AP": 4.0}}
    assert iteration_of(tmp_path / "run/model_final.pth") == 3
    assert iteration_of(tmp_path / "run/model_best.pth") == 1
    written = (tmp_path / "run/model_final.pth").stat().st_mtime_ns
    scored(kind, [], patience=2, resume=True)  # nothing to do
    assert (tmp_path / "run/model_final.pth").stat().st_mtime_ns == written
    scored(kind, [6.0, 5.0], resume=True)  # without patience it goes on
    assert iteration_of(tmp_path / "run/model_final.pth") == 5
    assert iteration_of(tmp_path / "run/model_best.pth") == 4


def test_the_best_value_survives_a_crash_and_later_values_are_forgotten(scored, tmp_path):
    with pytest.raises(ZeroDivisionError):  # iteration 2 was evaluated, but the checkpoint is of 1
        scored("yaml", [7.0, 1.0, 9.0, ZeroDivisionError()])
    known = json.loads((tmp_path / "run/model_best.json").read_text())
    assert known == {"metric": "segm/AP", "values": {"0": 7.0, "1": 1.0, "2": 9.0}}
    (tmp_path / "run/model_0000003.pth").unlink()
    scored("yaml", [9.0, 8.0, 8.0, 8.0], resume=True)
    assert iteration_of(tmp_path / "run/model_best.pth") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["TEST.EARLY_STOPPING=2"], "needs a metric; set TEST.BEST_METRIC"),
        (["TEST.BEST_METRIC=segm/AP"], "needs evaluations during the training; set TEST.EVAL"),
    ],
)
def test_settings_that_cannot_work_are_refused(short_run, options, words):
    with pytest.raises(UserError, match=words):
        train(short_run("mask_rcnn", "yaml", "run", *options))


def test_an_unknown_metric_is_a_warning_that_names_the_results(tmp_path, caplog):
    class Settings:
        best_metric, early_stopping, eval_period = "segm/APP", 0, 1

        def test_sets(self):
            return ["a"]

    class Folder:
        save_dir = str(tmp_path)

    best = BestCheckpoint(Folder(), Settings())
    best.update({"segm": {"AP": 1.0, "AP50": 2.0}}, 3)
    assert "'segm/APP'" in caplog.text and "segm/AP, segm/AP50" in caplog.text
    assert list(tmp_path.iterdir()) == []
