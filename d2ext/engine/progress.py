"""The bar of a training in a terminal. Elsewhere there are lines, and `log.txt` always has them."""

import logging
import sys

from tqdm import tqdm

from d2ext.engine.console import LOGGERS

from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter

_LINES = CommonMetricPrinter.__module__  # the logger of the lines that the bar stands for


class _AboveBar(logging.Filter):
    """Clears the bar before a line comes, and leaves out the lines that it stands for."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self._bar = bar

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == _LINES and record.levelno < logging.WARNING:
            return False
        self._bar.clear()
        return True


class ProgressBar(HookBase):
    """tqdm's bar with iterations, time left, total loss and learning rate, on stderr.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr

    def before_train(self):
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            unit="it",
            file=self._stream,
            dynamic_ncols=True,
        )
        self._filter = _AboveBar(self._bar)
        own = [h for name in LOGGERS for h in logging.getLogger(name).handlers]
        self._handlers = [h for h in own if getattr(h, "stream", None) is sys.stdout]
        for handler in self._handlers:
            handler.addFilter(self._filter)

    def after_step(self):
        latest = self.trainer.storage.latest()
        shown = {"loss": "total_loss", "lr": "lr"}
        values = {k: f"{latest[name][0]:.4g}" for k, name in shown.items() if name in latest}
        self._bar.set_postfix(values, refresh=False)
        self._bar.update()

    def after_train(self):
        self._bar.close()
        for handler in self._handlers:
            handler.removeFilter(self._filter)


def progress_bar() -> ProgressBar | None:
    """A bar if stderr is a terminal."""
    return ProgressBar() if sys.stderr is not None and sys.stderr.isatty() else None
