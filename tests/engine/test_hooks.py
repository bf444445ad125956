"""Interrupts and checkpoint clean-up."""

import os
import signal

import pytest

from d2ext.engine import train
from d2ext.engine.hooks import StopRequested

from tests.engine.helpers import losses


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


def test_only_the_newest_checkpoints_are_kept(short_run, tmp_path):
    train(short_run("mask_rcnn", "yaml", "run", "SOLVER.CHECKPOINT_KEEP=2"))
    names = sorted(p.name for p in (tmp_path / "run").glob("*.pth"))
    assert names == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]
