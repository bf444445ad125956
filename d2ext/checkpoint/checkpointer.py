"""Checkpoints that survive a crash while being written and that know the names of their classes."""

import collections.abc
import os
import pickle
import zipfile
from typing import Any, Dict, List, Optional

import torch

from d2ext.checkpoint.rng import RNGState
from d2ext.errors import UserError
from detectron2.checkpoint import DetectionCheckpointer

METADATA_KEY = "metadata"


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer plus atomic writing, class names, RNG states and one-line errors.

    Args:
        model: the module, wrapped in DDP or not.
        save_dir: output folder.
        metadata: plain values stored beside the weights; ``thing_classes`` (list of names) is what
            the predictor and ``--resume`` read back.
        checkpointables: as in detectron2; the trainer is passed as ``trainer=``.

    ``save`` is collective: every process calls it, because each contributes its RNG state.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        metadata: Optional[Dict[str, Any]] = None,
        save_to_disk: Optional[bool] = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.metadata = dict(metadata or {})

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/name.pth`` through a temporary file, then tag it as the last one."""
        for checkpointable in self.checkpointables.values():
            if isinstance(checkpointable, RNGState):
                checkpointable.gather()
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), METADATA_KEY: self.metadata}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        _write_atomically(path, lambda f: torch.save(data, f))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_atomically(path, lambda f: f.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        """Load weights, and the named checkpointables (default: all).

        Raises:
            UserError: the file is missing or cannot be read.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise UserError(
                f"checkpoint '{path}' does not exist; set train.init_checkpoint (lazy) or "
                "MODEL.WEIGHTS (yaml) to a file, or to '' to start from random weights"
            )
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            return super()._load_file(filename)
        except (
            RuntimeError,
            EOFError,
            OSError,
            KeyError,
            ValueError,
            zipfile.BadZipFile,
            pickle.UnpicklingError,
        ) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"checkpoint '{filename}' cannot be read: {reason}") from error

    def _load_model(self, checkpoint: Dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        if incompatible is not None:  # batch norm counters mean nothing to frozen statistics
            incompatible.unexpected_keys[:] = [
                key for key in incompatible.unexpected_keys if not key.endswith("num_batches_tracked")
            ]
        return incompatible


def _write_atomically(path: str, write) -> None:
    """Write a file so that a reader, or a restart after a crash, sees the old or the new one whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read_metadata(path: str) -> Dict[str, Any]:
    """The ``metadata`` entry of a checkpoint file written by :class:`Checkpointer`; else ``{}``.

    Weights stay on disk (memory-mapped), so this is quick for large files too.
    """
    if not path or not os.path.isfile(path) or not path.endswith(".pth"):
        return {}
    try:
        data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
        return {}  # whoever loads the weights reports what is wrong with the file
    found = data.get(METADATA_KEY, {}) if isinstance(data, collections.abc.Mapping) else {}
    return dict(found) if isinstance(found, collections.abc.Mapping) else {}


