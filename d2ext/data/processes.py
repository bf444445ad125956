"""Loading processes and signals: a Ctrl-C or SIGTERM to the group is for the main process, which
ends its loading processes, and neither starts nor ends them by halves.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ignore_signals(worker_id: int = 0) -> None:
    """In a loading process: leave signals to the main process."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM at the end of a `with` block (main thread; others get none).

    A handler that raises would leave the block in the middle, with processes that nobody knows any
    more, and that multiprocessing waits for at the end of the program, forever as they ignore the
    SIGTERM by which it ends them.
    """
    if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
        yield
        return
    pending: list[int] = []
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: pending.append(number))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in pending:
        signal.raise_signal(number)


@contextlib.contextmanager
def starting_all_or_none() -> Iterator[None]:
    """End the processes that a `with` block has started if it fails."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
