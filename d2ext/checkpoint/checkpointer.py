"""Checkpoints that survive a crash while being written and that know the names of their classes."""

import collections.abc
import os
import pickle
import zipfile
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import torch

from d2ext.checkpoint.rng import RNGState
from d2ext.config import paths as _paths  # noqa: F401  makes d2ext:// known
from d2ext.errors import UserError

from detectron2.checkpoint import DetectionCheckpointer

METADATA_KEY = "metadata"
_WEIGHT_TYPES = (torch.Tensor, np.ndarray)
_COUNTERS = ".num_batches_tracked"  # of batch norm; without meaning to fixed statistics
# What torch and pickle make of a file that is damaged or something else.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer plus atomic writing, class names, RNG states and one-line errors.

    Args:
        model: the module, wrapped in DDP or not.
        save_dir: output folder.
        metadata: plain values stored beside the weights; ``thing_classes`` (list of names) is what
            the predictor reads back.
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
        self._source = ""
        self._missing: List[str] = []

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``save_dir/name.pth`` through a temporary file, then tag it as the last one.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
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
        """Make a file of the folder the one that ``--resume`` continues from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_atomically(path, lambda f: f.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        """Load weights, and the named checkpointables (default: all).

        Args:
            path: a file, an address such as ``https://...``, ``detectron2://...`` or
                ``d2ext://...``, or ``""`` to load nothing.
            checkpointables: names given to the constructor.

        Returns:
            What else the file holds.

        Raises:
            UserError: the file is missing, cannot be read, or is not for this model.
        """
        self._source = path
        if path:
            self._check_existence(path)
        try:
            return super().load(path, checkpointables)
        except UserError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError) as error:  # of load_state_dict
            raise UserError(
                f"checkpoint '{path}' does not fit this run: {_reason(error)}"
            ) from error

    def load_complete(self, path: str) -> Dict[str, Any]:
        """As ``load(path, [])``, for evaluation and prediction: nothing may keep random weights.

        Raises:
            UserError: as :meth:`load`, or the file lacks parameters of the model.
        """
        rest = self.load(path, checkpointables=[])
        if self._missing:
            raise UserError(
                f"checkpoint '{path}' lacks {len(self._missing)} of the model's parameters, e.g. "
                f"'{self._missing[0]}'; name one of the whole model in MODEL.WEIGHTS (yaml) or "
                "train.init_checkpoint (lazy)"
            )
        return rest

    def _check_existence(self, path: str) -> None:
        local = path
        if "://" in path:
            try:
                local = self.path_manager.get_local_path(path)
            except UserError:
                raise
            except Exception as error:  # whatever the network makes of it
                raise UserError(
                    f"cannot download '{path}' ({_reason(error)}); get the file in another way and "
                    "name it in MODEL.WEIGHTS (yaml) or train.init_checkpoint (lazy)"
                ) from error
        if not os.path.isfile(local):
            raise UserError(
                f"checkpoint '{path}' does not exist; set MODEL.WEIGHTS (yaml) or "
                "train.init_checkpoint (lazy) to a file, or to '' to start from random weights"
            )

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            data = super()._load_file(filename)
        except _UNREADABLE as error:
            raise UserError(f"checkpoint '{filename}' cannot be read: {_reason(error)}") from error
        weights = data["model"]
        if isinstance(weights, collections.abc.Mapping):
            wrong = {k: v for k, v in weights.items() if not isinstance(v, _WEIGHT_TYPES)}
        else:
            wrong = {"model": weights}
        if wrong:
            name, value = next(iter(wrong.items()))
            raise UserError(
                f"checkpoint '{filename}' is not of the form {{'model': {{name: tensor}}}}: "
                f"'{name}' is a {type(value).__name__}"
            )
        return data

    def _load_model(self, checkpoint: Dict[str, Any]):
        in_file = next(iter(checkpoint["model"]), "nothing")
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [key for key, *_ in incompatible.incorrect_shapes]
        self._missing = [
            key for key in (*incompatible.missing_keys, *wrong_shape) if not key.endswith(_COUNTERS)
        ]
        of_model = {k for k in self.model.state_dict() if not k.endswith(_COUNTERS)}
        if of_model and of_model <= set(self._missing):
            raise UserError(
                f"checkpoint '{self._source}' has no weight of this model: it has '{in_file}' ..., "
                f"the model has '{min(of_model)}' ..."
            )
        incompatible.unexpected_keys[:] = [
            key for key in incompatible.unexpected_keys if not key.endswith(_COUNTERS)
        ]
        return incompatible


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _write_atomically(path: str, write: Callable) -> None:
    """Write a file so that a reader, or a restart after a crash, sees the old or the new one whole.

    What a crash leaves behind under the temporary name is overwritten by the next attempt.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or _reason(cause)
        raise UserError(f"cannot write '{path}': {reason}") from error
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
    except _UNREADABLE:
        return {}  # whoever loads the weights reports what is wrong with the file
    found = data.get(METADATA_KEY) if isinstance(data, collections.abc.Mapping) else None
    return dict(found) if isinstance(found, collections.abc.Mapping) else {}
