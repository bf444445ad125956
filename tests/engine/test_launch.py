"""Processes: which backend they talk by, what is refused, and that a mistake is printed once."""

import argparse
import socket

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from d2ext.engine import launch
from d2ext.errors import UserError

from tests.engine.helpers import CONFIGS


def arguments(**given):
    names = {"num_gpus": None, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return argparse.Namespace(**{**names, **given})


@pytest.mark.parametrize(
    "gpus, given, device, words",
    [
        (0, {"num_gpus": 1}, "cpu", "--num-gpus 1, but this machine has 0 GPUs; leave the option"),
        (0, {"num_gpus": 8}, "cpu", "torchrun --nproc-per-node=8"),
        (2, {"num_gpus": 4}, "cuda", "--num-gpus 4, but this machine has 2 GPUs"),
        (2, {"num_gpus": 2}, "cpu", "--num-gpus 2, but the device is 'cpu'"),
        (0, {"num_gpus": -1}, "cpu", "--num-gpus -1"),
        (0, {"num_machines": 0}, "cpu", "--num-machines 0"),
        (0, {"machine_rank": 3}, "cpu", "--machine-rank is 3"),
        (0, {"num_machines": 2}, "cpu", "--num-machines 2, but this machine has no GPU"),
    ],
)
def test_numbers_of_processes_that_cannot_be_are_refused(monkeypatch, gpus, given, device, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=words):
        launch.run(pytest.fail, arguments(**given), device)


@pytest.mark.parametrize("given", [{}, {"num_gpus": 0}])
def test_one_process_needs_no_gpu(monkeypatch, given):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    called = []
    launch.run(called.append, arguments(**given), "cpu")
    assert len(called) == 1


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl")])
def test_processes_of_torchrun_talk_by_what_the_device_of_the_config_needs(
    monkeypatch, device, backend
):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, str(value))
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: used.append(rank))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: used.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(launch, "_create_local_process_group", lambda size: None)
    launch.run(lambda args: None, arguments(), device)
    assert used == ([backend] if device == "cpu" else [0, backend])


def test_a_mistake_under_torchrun_is_printed_once(run_python, tmp_path):
    script = CONFIGS["mask_rcnn"].parents[1] / "tools/train_net.py"
    process = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script),
        *("--config-file", f"{CONFIGS['mask_rcnn']}.yaml", "SOLVER.MAX_ITR=3"),
        CUDA_VISIBLE_DEVICES="",
    )
    assert process.returncode == 1
    lines = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "SOLVER.MAX_ITR" in lines[0]


@pytest.mark.parametrize(
    "last, kind",
    [("d2ext.errors.UserError: a: b", UserError), ("ValueError: a: b", ProcessRaisedException)],
)
def test_a_mistake_in_one_of_several_gpu_processes_is_one_line(monkeypatch, last, kind):
    def fail(*args, **kwargs):
        raise ProcessRaisedException(f"\nTraceback:\n  File x\n{last}\n", 0, 1)

    monkeypatch.setattr(launch, "detectron2_launch", fail)
    with pytest.raises(kind) as error:
        launch.run(pytest.fail, arguments(), "cpu")
    assert kind is not UserError or str(error.value) == "a: b"


def test_without_torchrun_every_process_says_its_own(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert launch.is_first_to_say("x") and launch.is_first_to_say("x")


_TORCHRUN = """
import subprocess, sys
child = "import time; from d2ext.engine.launch import end_with_launcher as end; end();"
child += "print('ready', flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-W", "ignore", "-c", child])
"""
_KILLING = """
import subprocess, sys, time
torchrun = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
torchrun.stdout.readline()
torchrun.kill()
start = time.monotonic()
torchrun.stdout.read()  # ends with the last process that could write there
print("ended" if time.monotonic() - start < 30 else "stayed")
"""


def test_a_process_of_torchrun_ends_when_that_is_killed(run_python):
    """By SIGTERM, at which a training saves a checkpoint."""
    process = run_python("-c", _KILLING, _TORCHRUN)
    assert process.stdout == "ended\n", process.stderr


def test_a_process_whose_torchrun_ended_before_it_could_start_says_so(monkeypatch):
    """It would wait for that for half an hour."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused.getsockname()[1], "RANK": 1}
        values |= {"WORLD_SIZE": 2, "LOCAL_RANK": 1, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match="torchrun cannot be reached at 127.0.0.1:.* has ended"):
            launch.run(pytest.fail, arguments(), "cpu")
