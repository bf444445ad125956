"""Hooks that detectron2 does not have."""

import logging
import os
import signal
import threading

from d2ext.engine.folder import numbered_checkpoints

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class StopRequested(SystemExit):
    """Leaves the training loop after an interrupt; exit status 130 as shells expect."""

    def __init__(self):
        super().__init__(130)


class GracefulStop(HookBase):
    """On SIGINT (Ctrl-C) or SIGTERM, finish the iteration, save a checkpoint and stop.

    With several processes the signal acts as usual: they would have to agree on an iteration, which
    costs a round of communication in every step.
    """

    def __init__(self, checkpointer):
        self._checkpointer = checkpointer
        self._requested = False
        self._previous = {}

    def before_train(self):
        in_main_thread = threading.current_thread() is threading.main_thread()
        if comm.get_world_size() == 1 and in_main_thread:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def _request(self, number, frame):
        if self._requested:  # second Ctrl-C: now
            raise KeyboardInterrupt
        self._requested = True
        logger.warning("stopping after this iteration; a checkpoint will be saved")

    def after_step(self):
        if self._requested:
            iteration = self.trainer.iter
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            logger.warning("stopped at iteration %d; --resume continues from there", iteration)
            raise StopRequested

    def after_train(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class KeepLastCheckpoints(HookBase):
    """Delete numbered checkpoints that are not among the newest `count`, neither by iteration nor
    by the time they were written; `model_final` always stays."""

    def __init__(self, checkpointer, count: int):
        self._checkpointer, self._count = checkpointer, count

    def after_step(self):
        if self._count <= 0 or not comm.is_main_process():
            return
        folder = self._checkpointer.save_dir
        names = numbered_checkpoints(folder)
        by_time = sorted(names, key=lambda n: os.stat(os.path.join(folder, n)).st_mtime_ns)
        for name in set(names[: -self._count]) & set(by_time[: -self._count]):
            os.unlink(os.path.join(folder, name))
