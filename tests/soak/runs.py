"""Trainings and jobs in processes of their own, that tests interrupt."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PRELOADED = ["d2ext.engine", "d2ext.cli.predict_job", "fcis", "htc", "mnc"]
_SCRIPTS = {"train": "tools/train_net.py", "predict-job": "tools/predict.py"}


def _command_line(command, argv, output):
    """What the process does: the public command line in a process group of its own."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loading processes, as usual
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from d2ext.cli.main import main

    sys.exit(main([command, *argv]))


def _children(pid):
    """Numbers of the processes that a process has started."""
    try:
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return set()


def _runs(pid):
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class Run:
    """A command that was started, leader of a process group, which `with` ends for sure.

    One process comes from a server that has imported torch already, as the moments before
    matter to nothing; several come from torchrun.

    Args:
        argv: of the command line.
        output: text file to which the output of all processes is appended.
        processes: how many; from 2 on under torchrun.
        torchrun: its options, where several machines or restarts are wanted; `processes` is then
            the number of this machine's.
        command: of `d2ext`.
    """

    def __init__(self, argv, output, processes=1, torchrun=(), command="train"):
        self.output, self._children = Path(output), set()
        if processes == 1 and not torchrun:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOADED)
            self._process = context.Process(target=_command_line, args=(command, argv, str(output)))
            self._process.start()
        else:
            torchrun = ["-m", "torch.distributed.run", *(torchrun or ["--standalone"])]
            torchrun += [f"--nproc-per-node={processes}", str(ROOT / _SCRIPTS[command])]
            with open(output, "ab") as file:
                self._process = subprocess.Popen(
                    [sys.executable, *torchrun, *argv],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what a killed leader left behind
        self.wait(60)
        end = time.monotonic() + 60
        while alive := [pid for pid in self._children if _runs(pid)]:  # sessions of their own
            assert time.monotonic() < end, f"processes {alive} outlive their torchrun"
            time.sleep(0.05)

    @property
    def code(self):
        """Exit status, negative for a signal; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def wait(self, seconds):
        """The exit status, or None after so many seconds."""
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.code

    def wait_until(self, condition, seconds=120):
        """Return when `condition()` holds or the run has ended."""
        end = time.monotonic() + seconds
        while self.code is None and not condition():
            assert time.monotonic() < end, self.output.read_text(errors="replace")[-2000:]
            if isinstance(self._process, subprocess.Popen):
                self._children |= _children(self._process.pid)
            time.sleep(0.0005)

    def children(self):
        """Numbers of the processes that torchrun has started and that are there."""
        return sorted(int(pid) for pid in _children(self._process.pid) if _runs(pid))

    def signal(self, number, group):
        """Send a signal to the process, or to its whole group, if it is still there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self._process.pid, number)
