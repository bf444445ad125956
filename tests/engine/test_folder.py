"""The output folder: no run is lost to the next one, and two do not share it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2ext.engine import train
from d2ext.engine.folder import has_run, move_run_aside, numbered_checkpoints, training_folder
from d2ext.engine.hooks import KeepLastCheckpoints
from d2ext.errors import UserError

from tests.engine.helpers import short_overrides
from tests.engine.test_cli import run_main

ROOT = Path(__file__).resolve().parents[2]

# Locks a folder as a training does, says so, and leaves a child that outlives it.
OTHER_PROCESS = """
import os, sys, time
from d2ext.engine.folder import training_folder
with training_folder(sys.argv[1]):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def content(folder):
    """Names and contents of the files below a folder, but for locks."""
    files = [p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("name", ["last_checkpoint", "model_0000003.pth", "metrics.json"])
def test_a_folder_with_a_run_is_refused_without_resume_or_overwrite(tmp_path, name):
    write(tmp_path, "config.yaml", "log.txt", "model_best_of_all.txt")  # of a failed command
    with training_folder(str(tmp_path)):
        pass
    write(tmp_path, name)
    with pytest.raises(UserError, match="already has a run: --resume .* --overwrite"):
        with training_folder(str(tmp_path)):
            pass
    with training_folder(str(tmp_path), resume=True):
        with training_folder(str(tmp_path)):  # nested: decided already
            pass


def test_overwriting_moves_the_run_aside_and_leaves_other_runs(tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        write(run, "model_final.pth", "log.txt", "inference/a.json", "another_run/metrics.json")
        before = content(run)
        with training_folder(f"{run}/", overwrite=True):
            assert not has_run(run)
    other = {"another_run/metrics.json"}
    assert set(content(run)) == other
    for number in (1, 2):
        moved = content(tmp_path / f"run.{number}")
        assert moved == {name: text for name, text in before.items() if name not in other}


def test_a_run_that_cannot_be_moved_is_named(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "cross-device")

    write(tmp_path / "run", "model_final.pth")
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="cannot be moved to .*run.1': cross-device"):
        move_run_aside(str(tmp_path / "run"))


def test_a_second_training_is_refused_until_the_first_process_is_dead(tmp_path):
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {process.pid} on .* is training in"):
            with training_folder(str(tmp_path)):
                pass
        process.kill()
        process.wait()
        with training_folder(str(tmp_path)):  # although the child has the file open
            os.kill(child, 0)
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_clean_up_keeps_what_is_newest_by_iteration_or_by_time(tmp_path):
    class Folder:
        save_dir = str(tmp_path)

    names = [f"model_{i:07d}.pth" for i in (1, 2, 30, 40, 99999999)]
    write(tmp_path, *names, "model_final.pth")
    for age, name in enumerate(reversed(names)):  # the oldest run had come further
        os.utime(tmp_path / name, (10**9 + age, 10**9 + age))
    KeepLastCheckpoints(Folder, 2).after_step()
    assert numbered_checkpoints(str(tmp_path)) == [names[0], names[1], names[3], names[4]]
    assert (tmp_path / "model_final.pth").exists()
    KeepLastCheckpoints(Folder, 0).after_step()
    assert len(numbered_checkpoints(str(tmp_path))) == 4


def test_commands_that_fail_or_evaluate_leave_the_files_of_a_run(short_run, shapes_few, tmp_path):
    train(short_run("mask_rcnn", "yaml", "run", "train.max_iter=2"))
    run = tmp_path / "run"
    before = content(run)
    assert "MAX_ITER: 2" in before["config.yaml"].decode()
    command = ["--config-file", str(ROOT / "configs/mask_rcnn_tiny.yaml")]
    command += ["--no-data-check", *short_overrides("mask_rcnn", "yaml", run, shapes_few)]
    assert run_main(*command) == 1  # the folder has a run
    assert content(run) == before
    assert run_main(*command, "--resume", "MODEL.FPN.OUT_CHANNELS=32") == 1  # another network
    failed = content(run)
    for name in ("config.yaml", "model_0000001.pth", "model_final.pth", "last_checkpoint"):
        assert failed[name] == before[name]
    evaluation = ["--eval-only", f"DATASETS.TEST={shapes_few}", "TEST.DETECTIONS_PER_IMAGE=3"]
    assert run_main(*command, *evaluation, f"MODEL.WEIGHTS={run / 'model_final.pth'}") == 0
    after = content(run)
    # In this one process the log of the last command is still written to.
    changed = {name for name in after if after[name] != failed.get(name)} - {"log.txt"}
    assert all(name.startswith("inference/") for name in changed)
    assert "DETECTIONS_PER_IMAGE: 3" in after["inference/config.yaml"].decode()
    assert b"Evaluation results" in after["inference/log.txt"]
