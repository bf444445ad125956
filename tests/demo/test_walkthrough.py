"""The parts of `make demo` one by one: watching a training, the machine, the models, the report."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from d2ext.errors import UserError

# ------------------------------------------------------------------------- watching a training


@pytest.fixture
def watched(tmp_path):
    from walkthrough.training import Watcher

    watcher = Watcher(tmp_path, max_iter=20)

    def write(name, text):
        with open(tmp_path / name, "a") as f:
            f.write(text)
        watcher.poll()
        return watcher

    return write


def test_watcher_follows_a_training_from_start_to_result(watched):
    assert watched("log.txt", "building\n").status() == "starting"
    watcher = watched("log.txt", "INFO: Starting training from iteration 0\n")
    assert watcher.status().split() == ["training", "0%", "0/20"]
    watcher = watched("metrics.json", '{"iteration": 9, "total_loss": 1.5}\n')
    assert watcher.status().startswith("training  50%  10/20  loss 1.500")
    watcher = watched("metrics.json", '{"iteration": 19, "total_loss": 1.0}\n')
    assert watcher.status() == "evaluating"
    assert watched("log.txt", "Inference done 50/200. x\n").status() == "evaluating 25%"
    assert watcher.metrics == {}
    watcher = watched("metrics.json", '{"iteration": 20, "segm/AP": 31.5}\n')
    result = watcher.result()
    assert result.metrics["segm/AP"] == 31.5
    assert [record["total_loss"] for record in result.curve] == [1.5, 1.0]
    assert result.seconds >= 0


def test_time_left_counts_down_between_two_readings(watched, monkeypatch):
    from walkthrough import training

    now = 100.0
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    watched("log.txt", "Starting training from iteration 0\n")
    now = 130.0
    watcher = watched("metrics.json", '{"iteration": 4, "total_loss": 1.5}\n')
    assert watcher.status().endswith("1:30 left")  # 15 iterations of 6 seconds
    now = 140.0
    assert watcher.status().endswith("1:20 left")
    now = 500.0
    assert watcher.status().endswith("0:00 left")


def test_half_written_line_is_read_when_it_is_whole(watched):
    assert watched("metrics.json", '{"iteration": 9, "tot').iteration == 0
    assert watched("metrics.json", 'al_loss": 1.5}\n').iteration == 10


def training_of(script, folder):
    from walkthrough.training import Training

    (folder / "train.py").write_text(script)
    return Training("net", [sys.executable, str(folder / "train.py")], folder, 20)


def test_failed_command_is_one_line_that_names_reason_and_log(tmp_path):
    from walkthrough.training import train_all

    log = tmp_path / "log.txt"
    log.write_text("what the command logged itself\n")
    training = training_of("import sys; sys.exit('error: no such key FOO')", tmp_path)
    with pytest.raises(UserError) as caught:
        train_all([training], 1)
    assert str(caught.value) == f"train.py failed with status 1: no such key FOO; see {log}"
    assert "itself\n" in log.read_text() and "error: no such key FOO" in log.read_text()


def test_interrupted_demo_leaves_no_training_behind(tmp_path, monkeypatch):
    from walkthrough import training

    script = (
        "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(60)"
    )
    script = script.replace("'pid'", repr(str(tmp_path / "pid")))

    def poll(watcher):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Watcher, "poll", poll)
    with pytest.raises(KeyboardInterrupt):
        training.train_all([training_of(script, tmp_path)], 1)
    pid = (tmp_path / "pid").read_text().strip()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("chosen", [None, "3"])
def test_number_of_threads_is_that_of_the_user_or_of_the_cores(monkeypatch, chosen):
    from walkthrough import training

    monkeypatch.setattr(training, "default_threads", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert training.child_environment()["OMP_NUM_THREADS"] == (chosen or "5")


def test_progress_outside_a_terminal_is_a_line_per_tenth(monkeypatch):
    from walkthrough.training import ProgressLine

    stream = io.StringIO()
    line = ProgressLine("net", stream)
    for percent in range(0, 101):
        line.show(f"training {percent:3d}%")
    line.close("done")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12 and lines[-1].split() == ["net", "done"]


@pytest.mark.parametrize("seconds, text", [(5.4, "0:05"), (65, "1:05"), (3665, "1:01:05")])
def test_clock(seconds, text):
    from walkthrough.training import clock

    assert clock(seconds) == text


# --------------------------------------------------------------------------------- the machine


def test_hyper_threads_are_not_counted_as_cores(tmp_path):
    from walkthrough import machine

    blocks = [f"processor : {n}\nphysical id : {n % 2}\ncore id : {n // 2 % 2}\n" for n in range(8)]
    (tmp_path / "cpuinfo").write_text("\n".join(blocks))
    assert machine._physical_cores(None, tmp_path / "cpuinfo") == 4
    assert machine._physical_cores({0, 4}, tmp_path / "cpuinfo") == 1
    assert machine._physical_cores(None, tmp_path / "absent") is None


@pytest.mark.parametrize(
    "text, quota", [("200000 100000", 2), ("50000 100000", 1), ("max 100000", None)]
)
def test_quota_of_a_container_limits_the_cores(tmp_path, monkeypatch, text, quota):
    from walkthrough import machine

    (tmp_path / "cpu.max").write_text(text)
    assert machine._cgroup_quota(tmp_path) == quota
    monkeypatch.setattr(machine, "_cgroup_quota", lambda: quota)
    monkeypatch.setattr(machine, "_physical_cores", lambda allowed: 6)
    assert machine.usable_cores() == (quota or 6)


# ---------------------------------------------------------------------------------- the models


def test_every_model_has_its_config_and_its_script():
    from walkthrough import models

    for model in models.MODELS:
        assert (models.ROOT / model.config).is_file() and (models.ROOT / model.script).is_file()
        assert Path(model.config).stem == model.name


def test_models_are_chosen_by_name_and_unknown_names_are_errors():
    from walkthrough import models

    assert [m.name for m in models.select(["htc_tiny", "mask_rcnn_tiny"])] == [
        "mask_rcnn_tiny",
        "htc_tiny",
    ]
    assert models.select([]) == list(models.MODELS)
    with pytest.raises(UserError, match="htc: no such model; there are .*htc_tiny"):
        models.select(["htc"])


def test_a_config_of_any_project_is_a_model_too():
    from walkthrough import models

    names = ["elsewhere/own_tiny.yaml", "htc_tiny"]
    htc, own = models.select(names)
    assert (htc.name, own.name, own.title) == ("htc_tiny", "own_tiny", "own_tiny")
    assert own.script == "tools/train_net.py" and own.config.endswith("/elsewhere/own_tiny.yaml")
    texts = ["own_tiny:a.b=1", "htc_tiny:c=2", "d=3"]
    assert models.overrides_for(own, texts, names) == ["a.b=1", "d=3"]
    assert models.overrides_for(htc, texts, names) == ["c=2", "d=3"]
    with pytest.raises(UserError, match="there is another model 'htc_tiny'"):
        models.select(["htc_tiny", "elsewhere/htc_tiny.py"])


def test_overrides_concern_all_models_or_one():
    from walkthrough import models

    texts = ["a.b=1", "htc_tiny:c=x:y", "mask_rcnn_tiny:d=2"]
    mask_rcnn, htc = models.select(["mask_rcnn_tiny", "htc_tiny"])
    assert models.overrides_for(htc, texts) == ["a.b=1", "c=x:y"]
    assert models.overrides_for(mask_rcnn, texts) == ["a.b=1", "d=2"]
    with pytest.raises(UserError, match="no model 'hct_tiny'"):
        models.overrides_for(htc, ["hct_tiny:c=1"])
    with pytest.raises(UserError, match="KEY=VALUE"):
        models.overrides_for(htc, ["a.b"])


def test_second_demo_starts_afresh_but_never_deletes_what_is_not_its_own(tmp_path):
    from walkthrough import models

    models.make_fresh(tmp_path / "net")
    (tmp_path / "net/model_final.pth").touch()
    models.make_fresh(tmp_path / "net")
    assert not (tmp_path / "net/model_final.pth").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/model_final.pth").touch()
    with pytest.raises(UserError, match="was not made by the demo"):
        models.make_fresh(tmp_path / "own")
    assert (tmp_path / "own/model_final.pth").exists()


# ---------------------------------------------------------------------------------- the report


def test_pictures_show_images_with_objects_spread_over_the_set():
    from walkthrough.pictures import choose_records

    records = [{"image_id": i, "annotations": [{}] * (i % 4)} for i in range(40)]
    chosen = [r["image_id"] for r in choose_records(records, 4)]
    assert chosen == [3, 15, 27, 39]
    assert len(choose_records(records[:3], 4)) == 3


def test_overview_has_a_row_per_image_and_a_column_per_network():
    from walkthrough import pictures

    dark, light = (np.full((40, 60, 3), value, np.uint8) for value in (30, 220))
    sheet = pictures.overview({"truth": [dark, dark], "net": [light, light, light]})
    assert sheet.shape[0] > 80 and sheet.shape[1] > 120 and sheet.dtype == np.uint8
    right = sheet.shape[1] // 2
    assert (sheet[:, :right] == 30).all(2).sum() == 2 * 40 * 60
    assert (sheet[:, right:] == 220).all(2).sum() == 2 * 40 * 60


@pytest.fixture
def outcomes():
    from walkthrough import models, report
    from walkthrough.training import TrainingResult

    curve = [{"iteration": i, "total_loss": 9.0 - i} for i in range(8)]
    good = {"bbox/AP": 40.0, "segm/AP": 31.25, "segm/AP50": 60.5, "segm/AP-disk": 50.0}
    stages = [{"segm/AP": 29.0}, {"segm/AP": 30.0}, {"segm/AP": 31.25}]
    blind = {"bbox/AP": float("nan")}
    first, second = models.select(["mask_rcnn_tiny", "htc_tiny"])
    return [
        report.Outcome(
            first, "python x.py", Path("a/w.pth"), 3_000_000, TrainingResult(65.0, blind, curve)
        ),
        report.Outcome(
            second,
            "python x.py",
            Path("b/w.pth"),
            5_000_000,
            TrainingResult(130.0, good, curve),
            stages,
        ),
    ]


def test_metrics_file_is_strict_json_with_zero_for_a_network_that_found_nothing(outcomes, tmp_path):
    from walkthrough import report

    def refuse(text):
        raise ValueError(text)

    report.write_metrics(outcomes, tmp_path / "metrics.json")
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert found["mask_rcnn_tiny"]["segm/AP50"] == 0
    assert found["htc_tiny"]["segm/AP50"] == 60.5
    assert found["htc_tiny"]["stage2/segm/AP"] == 30
    assert found["htc_tiny"]["train_seconds"] == 130
    assert found["htc_tiny"]["parameters"] == 5_000_000


def test_table_has_one_row_per_network(outcomes):
    from walkthrough import report

    rows = report.table(outcomes).splitlines()[2:]
    assert rows[0].split() == "mask_rcnn_tiny 3.00 M 65 0.0 0.0 0.0 0.0".split()
    assert rows[1].split() == "htc_tiny 5.00 M 130 40.0 31.2 60.5 0.0".split()


def test_words_tell_of_trainings_side_by_side_no_more_time_than_there_was(outcomes):
    """Two trainings of 65 and 130 seconds at a time took 131 seconds of 3 minutes."""
    from walkthrough import report

    facts = report.Facts("some_train", 500, "some_val", 200, "x.png", 180.0, 131.0, 2, "a machine")
    words = report.words([o.model for o in outcomes], [o.weights for o in outcomes], facts)
    assert words.title == "Two networks, trained and tested on this machine in 3 min 0 s"
    assert "that it had never seen" in words.lead and "500 images of some_train" in words.lead
    (tile,) = words.tiles
    assert tile == (
        "3 min 0 s", "in total, of which 2 min 11 s training, 2 networks at a time",
    )  # fmt: skip
    commands = dict(words.steps)
    assert commands["Compare networks again"] == "d2ext compare a b"
    assert "--weights b/w.pth --input x.png" in commands["Use a trained network on your images"]
    same = report.words([outcomes[0].model], [outcomes[0].weights], facts._replace(
        test_set="some_train", workers=1))  # fmt: skip
    assert "the same ones" in same.lead and same.title.startswith("One network,")
    assert same.tiles[0][1] == "in total, of which 2 min 11 s training"
