"""Where a training continues: at the newest checkpoint that is whole."""

import logging
import os

from d2ext.checkpoint import Checkpointer, read_file
from d2ext.engine.folder import numbered_checkpoints
from d2ext.errors import UserError

from detectron2.utils import comm

FINAL = "model_final.pth"
logger = logging.getLogger(__name__)


def find_last_checkpoint(folder: str) -> tuple[str, int]:
    """The newest checkpoint of a run that can be read; damaged ones are named in the log.

    The one that `last_checkpoint` names comes first, then the others by their iteration.
    Collective: the main process looks for all.

    Returns:
        its path and the iteration at which it continues; `("", 0)` if there is none.

    Raises:
        UserError: there are checkpoints, but all of them are damaged.
    """
    found, mistake = ("", 0), None
    if comm.is_main_process():
        try:
            found = _find(folder)
        except UserError as error:
            mistake = str(error)
    found, mistake = comm.all_gather((found, mistake))[0]
    if mistake:
        raise UserError(mistake)
    return found


def complete_final_checkpoint(checkpointer: Checkpointer, iteration: int) -> None:
    """Save `model_final.pth` unless it is there: a run may have ended between its last two saves.

    Collective. Args:
        checkpointer: of the run, after loading.
        iteration: the last one of the run.
    """
    path = os.path.join(checkpointer.save_dir, FINAL)
    try:
        complete = not os.path.isfile(path) or read_iteration(path) != iteration
    except UserError:
        complete = True
    if comm.all_gather(complete)[0]:
        checkpointer.save("model_final", iteration=iteration)


def read_iteration(path: str) -> int:
    """The iteration a checkpoint was saved after, if all of the file is as it was written.

    Raises:
        UserError: the file is missing, damaged, or no checkpoint of a training.
    """
    if not os.path.isfile(path):
        raise UserError(f"checkpoint '{path}' does not exist")
    rest = read_file(path).rest
    if "trainer" not in rest or not isinstance(rest.get("iteration"), int):
        raise UserError(f"checkpoint '{path}' cannot be resumed: it has no state of a training")
    return rest["iteration"]


def _find(folder: str) -> tuple[str, int]:
    tagged, mistakes = _tagged(folder), []
    if tagged:
        try:
            path = os.path.join(folder, tagged)
            return path, read_iteration(path) + 1
        except UserError as error:
            mistakes.append(str(error))
    names = [*numbered_checkpoints(folder), FINAL]
    others = {}
    for path in [os.path.join(folder, name) for name in names if name != tagged]:
        if os.path.isfile(path):
            try:
                others[path] = read_iteration(path) + 1
            except UserError as error:
                mistakes.append(str(error))
    if not others and mistakes:
        raise UserError(
            f"{'; '.join(mistakes)}; '{folder}' has no other checkpoint, --overwrite starts anew"
        )
    for mistake in mistakes:
        logger.warning("%s", mistake)
    if not others:
        return "", 0
    path = max(others, key=lambda p: others[p])
    logger.warning("continuing from '%s' instead", path)
    return path, others[path]


def _tagged(folder: str) -> str:
    """The name in `last_checkpoint`; empty if there is none."""
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as f:
            return os.path.basename(f.read().strip())
    except (OSError, UnicodeDecodeError):
        return ""
