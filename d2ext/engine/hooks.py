"""Hooks that detectron2 does not have."""

import logging
import os

from d2ext.engine.folder import numbered_checkpoints
from d2ext.errors import UserError

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)


class SaveCheckpoints(HookBase):
    """Save a numbered checkpoint every `period` iterations, and `model_final` after the last one.

    One that cannot be written, because the disk is full, is left out with a warning: the training
    goes on, the previous one stays, and the next period tries again. `model_final` has to succeed.
    """

    def __init__(self, checkpointer, period: int):
        self._checkpointer, self._period = checkpointer, period

    def after_step(self):
        iteration = self.trainer.iter
        if (iteration + 1) % self._period == 0:
            try:
                self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            except UserError as error:
                logger.warning(
                    "%s; the training goes on, the next checkpoint is tried in %d iterations",
                    error,
                    self._period,
                )
        if iteration + 1 == self.trainer.max_iter:
            self._checkpointer.save("model_final", iteration=iteration)


class PatientWriter(EventWriter):
    """Passes on to another writer; while the disk is full it warns instead of ending the run."""

    def __init__(self, writer: EventWriter):
        self._writer, self._failing = writer, False

    def write(self):
        self._try(self._writer.write)

    def close(self):
        self._try(self._writer.close)

    def _try(self, function):
        try:
            function()
        except OSError as error:
            if not self._failing:
                name = type(self._writer).__name__
                logger.warning("%s cannot write (%s); the training goes on", name, error)
            self._failing = True
        else:
            self._failing = False


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
