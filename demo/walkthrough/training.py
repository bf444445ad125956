"""One training as a user would start it: `train_net.py` in a process of its own, watched through
the files it writes, with one line of progress."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from d2ext.errors import UserError

from .machine import default_threads

_POLL_SECONDS = 0.3


class TrainingResult(NamedTuple):
    """What the files of a finished training say.

    Attributes:
        seconds: from the first to the last iteration, without start-up and evaluation.
        metrics: ``{"segm/AP50": ..., ...}`` of the evaluation at the end.
        curve: ``iteration`` and ``total_loss`` lines of metrics.json, in order.
    """

    seconds: float
    metrics: Dict[str, float]
    curve: List[Dict[str, float]]


def child_environment() -> Dict[str, str]:
    """The environment of a child process: all cores, unless the user has chosen otherwise."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(default_threads()))
    env["PYTHONUNBUFFERED"] = "1"
    return env


def run_logged(command: List[str], log: Path, poll=lambda: None) -> None:
    """Run a command whose messages end up in ``log``, calling ``poll`` while it runs.

    The command itself writes the log; what it leaves on stderr is added if it fails.

    Raises:
        UserError: it failed; names the log.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, env=child_environment()
        )
        try:
            while process.poll() is None:
                poll()
                time.sleep(_POLL_SECONDS)
            poll()
        finally:
            _end(process)
        if process.returncode:
            stderr.seek(0)
            _fail(command, process.returncode, stderr.read(), log)


def _end(process: subprocess.Popen) -> None:
    """Stop a process that is still running, kindly first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _fail(command: List[str], status: int, stderr: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as f:
        f.write(f"\n$ {' '.join(command)}\n{stderr}\nexit status {status}\n")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reason = f": {lines[-1].removeprefix('error: ')}" if lines else ""
    raise UserError(f"{Path(command[1]).name} failed with status {status}{reason}; see {log}")


class Watcher:
    """Reads the log and metrics.json of a training while they grow.

    Args:
        folder: the output folder of the training.
        max_iter: number of iterations.

    Attributes:
        curve: lines of metrics.json that hold a loss.
        metrics: of the final evaluation; empty until then.
        started, finished: when the first iteration began and the last one ended, as
            ``time.monotonic()``, to within the polling interval.
    """

    def __init__(self, folder: Path, max_iter: int):
        self.max_iter = max_iter
        self.curve: List[Dict[str, float]] = []
        self.metrics: Dict[str, float] = {}
        self.started: Optional[float] = None
        self.finished: Optional[float] = None
        self._updated = 0.0
        self._evaluated = ""
        self._log = _GrowingFile(folder / "log.txt")
        self._json = _GrowingFile(folder / "metrics.json")

    def poll(self) -> None:
        """Read what is new."""
        now = time.monotonic()
        for line in self._log.new_lines():
            if "Starting training from iteration" in line:
                self.started = now
            match = re.search(r"Inference done (\d+)/(\d+)", line)
            if match:
                self._evaluated = f" {100 * int(match[1]) // int(match[2])}%"
        for line in self._json.new_lines():
            record = json.loads(line)
            if "total_loss" in record:
                self.curve.append(record)
                self._updated = now
            if any("/AP" in key for key in record):
                self.metrics = record
        if self.finished is None and self.iteration >= self.max_iter:
            self.finished = now

    @property
    def iteration(self) -> int:
        """Iterations done, as far as metrics.json tells."""
        return int(self.curve[-1]["iteration"]) + 1 if self.curve else 0

    def status(self) -> str:
        """One line for the terminal."""
        if self.finished is not None:
            return f"evaluating{self._evaluated}"
        if not self.curve or self.started is None:
            return "starting" if self.started is None else f"training   0%  0/{self.max_iter}"
        done = self.iteration
        # Counts down between two lines of metrics.json.
        seconds = (self._updated - self.started) * (self.max_iter - done) / done
        seconds = max(seconds - (time.monotonic() - self._updated), 0)
        return (
            f"training {100 * done // self.max_iter:3d}%  {done}/{self.max_iter}"
            f"  loss {self.curve[-1]['total_loss']:.3f}  {clock(seconds)} left"
        )

    def result(self) -> TrainingResult:
        """After the training has ended."""
        seconds = (self.finished or 0.0) - (self.started or 0.0)
        return TrainingResult(max(seconds, 0.0), self.metrics, self.curve)


class _GrowingFile:
    """Complete lines appended to a file since the last look; the file need not exist yet."""

    def __init__(self, path: Path):
        self._path, self._position = path, 0

    def new_lines(self) -> List[str]:
        try:
            with open(self._path, "rb") as f:
                f.seek(self._position)
                data = f.read()
        except FileNotFoundError:
            return []
        complete = data.rfind(b"\n") + 1
        self._position += complete
        return data[:complete].decode("utf-8", errors="replace").splitlines()


class ProgressLine:
    """One line that is rewritten on a terminal; elsewhere, a line per tenth and phase."""

    def __init__(self, name: str, stream=None):
        self._name, self._stream = name, stream or sys.stdout
        self._last = None

    def show(self, status: str) -> None:
        """Show a status such as ``training  42%  loss 1.2``."""
        text = f"{self._name:<24} {status}"
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{text}")
        else:
            percent = re.search(r"(\d+)%", status)
            step = (status.split()[0], int(percent[1]) // 10 if percent else None)
            if step == self._last:
                return
            self._last = step
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self, text: str) -> None:
        """Replace the status by a last line."""
        start = "\r\033[K" if self._stream.isatty() else ""
        self._stream.write(f"{start}{self._name:<24} {text}\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def train(command: List[str], name: str, folder: Path, max_iter: int) -> TrainingResult:
    """Run a training command to its end and show its progress.

    Raises:
        UserError: it failed, or ended without results; names the log.
    """
    watcher, line = Watcher(folder, max_iter), ProgressLine(name)

    def poll():
        watcher.poll()
        line.show(watcher.status())

    try:
        run_logged(command, folder / "log.txt", poll)
    except UserError:
        line.close("failed")
        raise
    if not watcher.metrics:
        line.close("failed")
        raise UserError(f"the training of {name} wrote no results; see {folder / 'log.txt'}")
    result = watcher.result()
    # Absent when nothing at all was found.
    line.close(
        f"trained in {clock(result.seconds)}, mask AP {watcher.metrics.get('segm/AP', 0):.1f}"
    )
    return result
