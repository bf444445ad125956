"""Interrupts: the run stops soon, and continues as if it had not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from d2ext.engine import loop, train
from d2ext.engine.stopping import StopRequested

from tests.engine.helpers import calling, losses, short_overrides

ROOT = Path(__file__).resolve().parents[2]


def same_weights(one, other):
    first, second = (torch.load(p / "model_final.pth")["model"] for p in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_interrupt_saves_a_checkpoint_from_which_the_run_continues(short_run, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    train(short_run("mask_rcnn", "yaml", "straight"))
    experiment = short_run("mask_rcnn", "yaml", "stopped", "train.checkpointer.period=100")
    build = experiment.build_train_loader

    def interrupting(start_iter=0):
        for number, batch in enumerate(build(start_iter)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    experiment.build_train_loader = interrupting
    with pytest.raises(StopRequested) as stop:
        train(experiment)
    assert stop.value.code == 130
    assert (tmp_path / "stopped/last_checkpoint").read_text() == "model_0000002.pth"
    assert signal.getsignal(signal.SIGINT) is handler
    train(short_run("mask_rcnn", "yaml", "stopped"), resume=True)
    before, after = losses(tmp_path / "straight"), losses(tmp_path / "stopped")
    assert after == pytest.approx(before, abs=1e-6)


@pytest.fixture
def start(shapes_root, tmp_path):
    """Function: start the command line in a process group of its own; killed at the end."""
    started = []

    def run(folder, *more, processes=1):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={processes}"]
        split = Path(shapes_root) / "shapes/train"
        command = [*launcher, str(ROOT / "tools/train_net.py"), "--no-data-check"]
        command += ["--config-file", str(ROOT / "configs/mask_rcnn_tiny.yaml")]
        command += ["--register", f"few={split / 'annotations.json'},{split / 'images'}"]
        command += short_overrides("mask_rcnn", "yaml", tmp_path / folder, "few")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(tmp_path / f"{folder}.txt", "wb") as output:
            process = subprocess.Popen(
                [*command, *more],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(path, text, process):
    """Return as soon as a file holds a text."""
    for _ in range(1200):
        if path.is_file() and text in path.read_text(errors="replace"):
            return
        assert process.poll() is None, path.with_suffix(".txt")
        time.sleep(0.05)
    raise AssertionError(f"{path} has no '{text}'")


def test_signals_to_the_process_group_with_loader_workers_lose_nothing(start, tmp_path):
    options = ["DATALOADER.NUM_WORKERS=2", "train.checkpointer.period=1000", "train.max_iter=30"]
    straight = start("straight", *options)
    reached = 3
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("run", *options, "--resume")
        wait_for(tmp_path / "run/metrics.json", f'"iteration": {reached}', process)
        os.killpg(process.pid, number)
        printed = tmp_path / "run.txt"
        assert process.wait(60) == 130, printed.read_text()
        assert "Traceback" not in printed.read_text()
        last = int((tmp_path / "run/last_checkpoint").read_text()[len("model_") : -len(".pth")])
        assert reached <= last < 29
        reached = last + 2
    assert start("run", *options, "--resume").wait(120) == straight.wait(120) == 0
    assert same_weights(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("whom", ["group", pytest.param("second process", marks=pytest.mark.slow)])
def test_several_processes_save_once_after_the_same_iteration(start, tmp_path, whom):
    process = start("run", "train.checkpointer.period=1000", "train.max_iter=500", processes=2)
    wait_for(tmp_path / "run/metrics.json", '"iteration": 3', process)
    if whom == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        second = next(
            pid
            for pid in children
            if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )
        os.kill(int(second), signal.SIGTERM)
    assert process.wait(60) != 0  # torchrun's own status
    checkpoints = [p.name for p in (tmp_path / "run").glob("*.pth")]
    assert [(tmp_path / "run/last_checkpoint").read_text()] == checkpoints
    assert "stopped at iteration" in (tmp_path / "run/log.txt").read_text()


def test_stop_during_an_evaluation_is_prompt_and_keeps_the_state_before_it(
    short_run, shapes_few, tmp_path, monkeypatch
):
    images, test_set = [], f"DATASETS.TEST={shapes_few}"
    options = [test_set, "TEST.EVAL_PERIOD=3", "train.checkpointer.period=100"]
    run_inference = loop.run_inference

    def interrupted(model, loader, evaluator, name):
        torch.rand(3)  # an evaluation may draw numbers

        def watched():
            for image in loader:
                images.append(image)
                if len(images) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield image

        return run_inference(model, Sized(watched(), len(loader)), evaluator, name)

    monkeypatch.setattr(loop, "run_inference", interrupted)
    with pytest.raises(StopRequested):
        train(short_run("mask_rcnn", "yaml", "run", *options))
    assert len(images) == 2
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_0000002.pth"
    monkeypatch.setattr(loop, "run_inference", run_inference)
    train(short_run("mask_rcnn", "yaml", "run"), resume=True)
    train(short_run("mask_rcnn", "yaml", "straight"))
    assert same_weights(tmp_path / "run", tmp_path / "straight")


class Sized:
    """An iterator that knows its length."""

    def __init__(self, iterator, length):
        self._iterator, self._length = iterator, length

    def __len__(self):
        return self._length

    def __iter__(self):
        return self._iterator


def test_stop_after_the_last_iteration_evaluates_nothing(short_run, shapes_few, monkeypatch):
    experiment = short_run("mask_rcnn", "yaml", "run", f"DATASETS.TEST={shapes_few}")
    monkeypatch.setattr(loop, "run_inference", None)  # would fail
    interrupt = {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(StopRequested):
        train(calling(experiment, interrupt))
