"""Ctrl-C, SIGTERM of a cluster, and several processes that have to agree on when to stop."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from detectron2.engine import HookBase
from detectron2.utils import comm

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
logger = logging.getLogger(__name__)


class StopRequested(SystemExit):
    """Leaves the training loop after an interrupt; exit status 130 as shells expect."""

    def __init__(self):
        super().__init__(130)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in at least one process. Collective: one number is exchanged."""
    if comm.get_world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor([int(flag)], device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number.item())


class GracefulStop(HookBase):
    """On SIGINT (Ctrl-C) or SIGTERM, finish the iteration, save a checkpoint and stop.

    Several processes stop after the same iteration, whichever of them was asked to. During an
    evaluation the stop is immediate, and what is saved is the state before it. A second Ctrl-C, a
    second later, ends a single process at once; further signals are else ignored, because
    launchers repeat those that the terminal has sent already.
    """

    def __init__(self, checkpointer):
        self._checkpointer = checkpointer
        self._requested_at: float | None = None
        self._evaluating = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Listen to the signals while a `with` block lasts (main thread only)."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = _SIGNALS if in_main_thread else ()
        previous = {number: signal.signal(number, self._request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Stop at once while a `with` block lasts. The random states must have been gathered."""
        try:
            self._evaluating = True
            if self._requested_at is not None:
                raise StopRequested
            yield
            comm.synchronize()  # here, where an interrupt is prompt
        except StopRequested:
            self._evaluating = False
            iteration = self.trainer.iter
            if iteration + 1 < self.trainer.max_iter:  # else `model_final` is there
                # Without the other processes, which may be anywhere in the evaluation.
                self._checkpointer.save(f"model_{iteration:07d}", gather=False, iteration=iteration)
            logger.warning("stopped during an evaluation; --resume continues after it")
            raise
        finally:
            self._evaluating = False

    def _request(self, number, frame):
        if os.getpid() != self._process:
            return  # a data loading process
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            if comm.is_main_process():  # not by the logger, which may be in the middle of a line
                os.write(2, b"stopping after this iteration; a checkpoint will be saved\n")
        elif number == signal.SIGINT and comm.get_world_size() == 1:
            if time.monotonic() - self._requested_at > 1:
                raise KeyboardInterrupt
        if self._evaluating:
            self._evaluating = False
            raise StopRequested

    def after_step(self):
        if not any_process(self._requested_at is not None):
            return
        self._requested_at = self._requested_at or time.monotonic()
        iteration = self.trainer.iter
        if iteration + 1 < self.trainer.max_iter:  # else `model_final` was saved
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        logger.warning("stopped at iteration %d; --resume continues from there", iteration)
        raise StopRequested
