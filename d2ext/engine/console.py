"""What the console shows: a few lines before the first iteration, everything after it; `log.txt`
has it all."""

import contextlib
import logging
import sys
from collections.abc import Iterator

LOGGERS = ("fvcore", "detectron2", "d2ext")


class _Brief(logging.Filter):
    """Passes warnings, and d2ext's own notes if they are one line."""

    def __init__(self):
        super().__init__()
        self.brief, self.closed = True, False

    def filter(self, record: logging.LogRecord) -> bool:
        if self.closed:
            return False
        own = record.name.startswith("d2ext") and "\n" not in record.getMessage()
        return not self.brief or record.levelno >= logging.WARNING or own


_FILTER = _Brief()


def begin_brief() -> None:
    """From now on the console of `LOGGERS` shows what a person wants to know before a run."""
    _FILTER.brief = True
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout and _FILTER not in handler.filters:
                handler.addFilter(_FILTER)


def end_brief() -> None:
    """From now on the console shows everything, as `log.txt` does."""
    _FILTER.brief = False


@contextlib.contextmanager
def log_file_only() -> Iterator[None]:
    """What is logged in a `with` block goes to `log.txt` only; for what the console gets in another
    form."""
    _FILTER.closed = True
    try:
        yield
    finally:
        _FILTER.closed = False
