"""Trainings that are killed again and again, at random moments, end with the weights of one that
never was."""

import collections
import random
import shutil
import signal
import time

import pytest
import torch

from tests.engine.helpers import short_overrides
from tests.soak.conftest import FULL
from tests.soak.runs import ROOT, Run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Kills of runs with one and two processes.
KILLS = {1: 160, 2: 40} if FULL else {1: 3}


@pytest.fixture
def argv(register_argument, register_few, tmp_path):
    """Function: arguments of a run of twelve iterations that saves after every second one, and
    evaluates on four images after the seventh and the last."""

    def make(folder, workers):
        overrides = short_overrides("mask_rcnn", "yaml", tmp_path / folder, "few")
        return [
            *("--config-file", str(ROOT / "configs/mask_rcnn_tiny.yaml")),
            *("--register", register_argument, "--register", register_few),
            *("--no-data-check", "--resume"),
            *overrides,
            *("train.max_iter=12", f"DATALOADER.NUM_WORKERS={workers}"),
            *("DATASETS.TEST=demo_few", "TEST.EVAL_PERIOD=7", "INPUT.MIN_SIZE_TEST=64"),
        ]

    return make


def interrupt(run, folder, seconds, rng):
    """Send a signal at a moment of a run that takes so many seconds, or while it saves for the
    first, second or third time; says what was sent, or nothing if the run had ended before."""
    if rng.random() < 0.5:
        when, saves = "saving", rng.randrange(1, 4)
        seen = [False]

        def saving():
            now = any(folder.glob("*.tmp"))
            seen.extend([now] if now != seen[-1] else [])
            return sum(seen) >= saves

        run.wait_until(saving)
        time.sleep(rng.uniform(0, 0.05))
    else:
        when, end = "anywhere", time.monotonic() + rng.uniform(0, seconds)
        run.wait_until(lambda: time.monotonic() > end)
    number, group = rng.choice(SIGNALS), rng.random() < 0.5
    if run.code is not None:
        return None
    run.signal(number, group)
    return number, "group" if group else "process", when


@pytest.mark.parametrize("processes", KILLS)
def test_killed_runs_end_with_the_weights_of_an_uninterrupted_one(
    argv, tmp_path, counted, processes
):
    rng = random.Random(processes)
    started = time.monotonic()
    with Run(argv("straight", 0), tmp_path / "straight.txt", processes) as run:
        assert run.wait(300) == 0, (tmp_path / "straight.txt").read_text()
    seconds = time.monotonic() - started
    straight = torch.load(tmp_path / "straight/model_final.pth")["model"]
    counts, runs = collections.Counter(), 0
    while sum(counts.values()) < KILLS[processes]:
        runs += 1
        name, workers = f"killed{runs}", 2 * (runs % 2)
        printed = tmp_path / f"{name}.txt"
        printed.touch()
        for _ in range(100):  # far more than it takes
            with Run(argv(name, workers), printed, processes) as run:
                sent = interrupt(run, tmp_path / name, seconds, rng)
                code = run.wait(120)
            text = printed.read_text(errors="replace")
            assert code is not None, f"{sent} did not end the run:\n{text[-3000:]}"
            if sent is None:
                assert code == 0, text[-3000:]
                break
            counts[f"{sent[0].name} to the {sent[1]}, {sent[2]}, {workers} workers"] += 1
            # 130 after a save; else the signal came before the training or after its end, where
            # multiprocessing, and torchrun at any time, make a 1 of it.
            number = int(sent[0])
            ended = processes > 1 or (tmp_path / name / "model_final.pth").exists()
            allowed = {0, -number, 128 + number, 130} | ({1} if ended else set())
            assert code in allowed, f"{sent}: {code}\n{text[-3000:]}"
        killed = torch.load(tmp_path / name / "model_final.pth")["model"]
        assert killed.keys() == straight.keys()
        assert all(torch.equal(killed[key], straight[key]) for key in killed), name
        shutil.rmtree(tmp_path / name)
        # After every run, so that a test that was stopped has counts as well.
        numbers = {"processes": processes, "runs": runs, "kills": sum(counts.values())}
        counted({**numbers, **dict(sorted(counts.items()))})
