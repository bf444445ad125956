"""The output folder of a training: one run at a time, and none that is lost to the next."""

import contextlib
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterator

from d2ext.errors import UserError

from detectron2.utils import comm

LOCK_FILE = ".lock"
_NUMBERED = re.compile(r"model_\d+\.pth")
_held: set[str] = set()  # folders that this process is training in

logger = logging.getLogger(__name__)


def numbered_checkpoints(folder: str) -> list[str]:
    """Names of the checkpoints `model_0000199.pth`, ... of a folder, by their iteration."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted((n for n in names if _NUMBERED.fullmatch(n)), key=lambda n: (len(n), n))


def has_run(folder: str) -> bool:
    """Whether a training has left checkpoints or metrics in a folder."""
    known = ("last_checkpoint", "metrics.json", "model_final.pth")
    return bool(numbered_checkpoints(folder)) or any(
        os.path.isfile(os.path.join(folder, name)) for name in known
    )


def move_run_aside(folder: str) -> str:
    """Move the files of a run, and its `inference` folder, into the first free one of
    `folder.1`, `folder.2`, ...; other folders in it may be runs of their own and stay.

    Returns:
        the new folder.

    Raises:
        UserError: something cannot be moved.
    """
    base, number = os.path.abspath(folder), 1
    while os.path.lexists(f"{base}.{number}"):
        number += 1
    target = f"{base}.{number}"
    try:
        os.mkdir(target)
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            own = not entry.is_dir(follow_symlinks=False) or entry.name == "inference"
            if own and entry.name != LOCK_FILE:
                os.rename(entry.path, os.path.join(target, entry.name))
    except OSError as error:
        raise UserError(
            f"the run in '{folder}' cannot be moved to '{target}': {error.strerror}; "
            "move it by hand or choose another output folder"
        ) from error
    return target


@contextlib.contextmanager
def training_folder(folder: str, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Have an existing output folder to oneself while a `with` block lasts; may be nested.

    Collective: the main process decides for all.

    Args:
        folder: where a training is about to write.
        resume: whether it continues a run that is there.
        overwrite: move a run that is there aside, see `move_run_aside`.

    Raises:
        UserError: in every process, if another process trains in the folder, or if it has a run
            and neither `resume` nor `overwrite` is set.
    """
    key = os.path.realpath(folder)
    if key in _held:
        yield
        return
    with contextlib.ExitStack() as stack:
        mistake = None
        if comm.is_main_process():
            try:
                stack.enter_context(_lock(folder))
                _check_run(folder, resume, overwrite)
            except UserError as error:
                mistake = str(error)
        mistake = comm.all_gather(mistake)[0]
        if mistake:
            raise UserError(mistake)
        _held.add(key)
        stack.callback(_held.discard, key)
        yield


def _check_run(folder: str, resume: bool, overwrite: bool) -> None:
    if not has_run(folder) or (resume and not overwrite):
        return
    if not overwrite:
        raise UserError(
            f"output folder '{folder}' already has a run: --resume continues it, --overwrite moves "
            "it aside, OUTPUT_DIR (yaml) or train.output_dir (lazy) names another folder"
        )
    if resume:
        raise UserError("--resume continues a run and --overwrite starts anew; leave one out")
    target = move_run_aside(folder)
    logger.warning("the run that was in %s is now in %s", folder, target)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """A lock that the system takes away when the process ends, however it does.

    `lockf`, not `flock`: data loading workers would inherit the latter and may live longer.
    """
    path = os.path.join(folder, LOCK_FILE)
    try:
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output folder '{folder}' cannot be written: {error.strerror}; "
            "set OUTPUT_DIR (yaml) or train.output_dir (lazy)"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{owner} is training in '{folder}'; wait for it, or set OUTPUT_DIR (yaml) or "
                "train.output_dir (lazy) to another folder"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("'%s' cannot be locked (%s): start one training only", folder, error)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
