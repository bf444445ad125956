"""Loading processes are there as a whole or not at all, whenever a signal comes."""

import multiprocessing

import pytest

from d2ext.data.processes import starting_all_or_none

# A loading process whose start or end is when a signal comes, whose handler raises.
_SIGNALLED = """
import multiprocessing, os, signal, sys, torch
from multiprocessing.context import ForkContext, ForkProcess
from d2ext.data.loader import Loader
from d2ext.data.processes import ignore_signals

number, moment = int(sys.argv[1]), sys.argv[2]

class Process(ForkProcess):
    def start(self):
        super().start()
        if moment == "start":
            os.kill(os.getpid(), number)

    def join(self, timeout=None):
        if moment == "end":
            os.kill(os.getpid(), number)
        super().join(timeout)

class Context(ForkContext):
    Process = Process

def stop(*_):
    global moment
    moment = "over"
    raise SystemExit(130)

signal.signal(number, stop)
loader = Loader(
    list(range(8)), num_workers=2, worker_init_fn=ignore_signals, collate_fn=lambda items: [{}],
    multiprocessing_context=Context(),
)
try:
    print(len(list(loader)), "batches")
finally:
    loader.close()
    print(len(multiprocessing.active_children()), "left")
"""


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("moment", ["start", "end"])
def test_a_signal_while_processes_start_or_end_leaves_none(run_python, number, moment):
    """Else multiprocessing waits for them at the end of the program, forever."""
    process = run_python("-W", "ignore", "-c", _SIGNALLED, number, moment)
    assert process.returncode == 130, process.stderr
    assert process.stdout == "0 left\n"


def test_processes_that_were_started_end_if_the_next_one_cannot_be():
    context = multiprocessing.get_context("spawn")
    with pytest.raises(OSError, match="memory"), starting_all_or_none():
        first = context.Process(target=print)
        first.start()
        raise OSError("no memory for another")
    first.join(30)
    assert first.exitcode == -9
