"""Restarts by `torchrun --max-restarts`: the same command again, which now has to continue."""

import json
import os
import socket
from pathlib import Path

from d2ext.engine.launch import started_by_torchrun

from detectron2.utils import comm

JOB_FILE = ".torchrun"


def is_restarted(folder: str) -> bool:
    """Whether the training in a folder was begun by the same `torchrun` that has started this
    process; then it goes on there, whatever the command line says about runs that are there.

    Collective. A `torchrun` is known by its process on any of its machines, as the first one may
    be another after a restart. Numbers of restarts would not do: after a mistake of the user's,
    `torchrun` restarts as well, and the folder may hold the run of somebody else.
    """
    if not started_by_torchrun():
        return False
    agents = set(comm.all_gather(_agent()))
    known = _read(folder) if comm.is_main_process() else []
    return bool(agents & set(comm.all_gather(known)[0]))


def note_start(folder: str) -> None:
    """Write down which `torchrun` trains in a folder. Collective."""
    if not started_by_torchrun():
        return
    agents = sorted(set(comm.all_gather(_agent())))
    if comm.is_main_process():
        Path(folder, JOB_FILE).write_text(json.dumps(agents), encoding="utf-8")


def _read(folder: str) -> list[str]:
    try:
        found = json.loads(Path(folder, JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _agent() -> str:
    """The parent of this process: machine, number, and when it began, as numbers are used again."""
    parent = os.getppid()
    try:  # the name, in parentheses, may contain anything
        status = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        began = status.split()[19]
    except (OSError, IndexError):
        began = ""
    return f"{socket.gethostname()} {parent} {began}"
