"""Trainings as a user would start them: `train_net.py` in processes of their own, watched through
the files they write. Several run side by side, a share of the cores each, because networks this
small gain little from a second thread."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from walkthrough.machine import default_threads

from d2ext.errors import UserError

_POLL_SECONDS = 0.3


class TrainingResult(NamedTuple):
    """What the files of a finished training say.

    Attributes:
        seconds: from the first to the last iteration, without start-up and evaluation.
        metrics: `{"segm/AP50": ..., ...}` of the evaluation at the end.
        curve: `iteration` and `total_loss` lines of metrics.json, in order.
    """

    seconds: float
    metrics: dict[str, float]
    curve: list[dict[str, float]]


def child_environment(shares: int = 1) -> dict[str, str]:
    """The environment of one of `shares` child processes that run at a time: its part of the
    cores, unless the user has chosen otherwise."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(default_threads() // shares, 1)))
    env["PYTHONUNBUFFERED"] = "1"
    return env


class Child:
    """A command whose messages end up in a log.

    The command itself writes the log; what it leaves on stderr is added if it fails.

    Args:
        command: program and arguments.
        log: the file to name when it fails.
        shares: number of such processes that run at a time.
    """

    def __init__(self, command: list[str], log: Path, shares: int = 1):
        self._command, self._log = command, log
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env=child_environment(shares),
        )

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it if it still runs, kindly first."""
        _end(self._process)

    def check(self) -> None:
        """After its end: raise a `UserError` that names the log if it failed."""
        if self._process.returncode:
            self._stderr.seek(0)
            _fail(self._command, self._process.returncode, self._stderr.read(), self._log)


def _end(process: subprocess.Popen) -> None:
    """Stop a process that is still running, kindly first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _fail(command: list[str], status: int, stderr: str, log: Path) -> None:
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
            `time.monotonic()`, to within the polling interval.
    """

    def __init__(self, folder: Path, max_iter: int):
        self.max_iter = max_iter
        self.curve: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}
        self.started: float | None = None
        self.finished: float | None = None
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

    def new_lines(self) -> list[str]:
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
        """Show a status such as `training  42%  loss 1.2`."""
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
    """`m:ss`, or `h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressGroup:
    """Progress of several trainings: on a terminal all in one line, elsewhere a line per tenth."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stdout
        self._statuses: dict[str, str] = {}
        self._lines: dict[str, ProgressLine] = {}

    def show(self, name: str, status: str) -> None:
        """Show the status of one training beside those of the others."""
        if not self._stream.isatty():
            self._lines.setdefault(name, ProgressLine(name, self._stream)).show(status)
            return
        self._statuses[name] = status
        text = " | ".join(f"{name}: {' '.join(s.split())}" for name, s in self._statuses.items())
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\033[K{text[:width]}")
        self._stream.flush()

    def close(self, name: str, text: str) -> None:
        """Last line of one training."""
        self._statuses.pop(name, None)
        ProgressLine(name, self._stream).close(text)


class Training(NamedTuple):
    """A training to run: its name, command, output folder and number of iterations."""

    name: str
    command: list[str]
    folder: Path
    max_iter: int


def train_all(trainings: list[Training], workers: int) -> dict[str, TrainingResult]:
    """Run training commands, `workers` at a time, and show their progress.

    Returns:
        Name -> result.

    Raises:
        UserError: one failed, or ended without results; names the log. The others are stopped.
    """
    waiting, running, results = list(trainings), [], {}
    progress = ProgressGroup()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                training = waiting.pop(0)
                child = Child(training.command, training.folder / "log.txt", workers)
                running.append((training, child, Watcher(training.folder, training.max_iter)))
            time.sleep(_POLL_SECONDS)
            for entry in list(running):
                training, child, watcher = entry
                ended = not child.running()  # before the last look at its files
                watcher.poll()
                if ended:
                    running.remove(entry)
                    results[training.name] = _result(training, child, watcher, progress)
                else:
                    progress.show(training.name, watcher.status())
    finally:
        for _, child, _ in running:
            child.stop()
    return results


def _result(training: Training, child: Child, watcher: Watcher, progress) -> TrainingResult:
    try:
        child.check()
        if not watcher.metrics:
            log = training.folder / "log.txt"
            raise UserError(f"the training of {training.name} wrote no results; see {log}")
    except UserError:
        progress.close(training.name, "failed")
        raise
    result = watcher.result()
    # Absent when nothing at all was found.
    mask_ap = watcher.metrics.get("segm/AP", 0)
    progress.close(training.name, f"trained in {clock(result.seconds)}, mask AP {mask_ap:.1f}")
    return result
