"""Checkpoints that survive a crash while being written and that know the names of their classes."""

import collections.abc
import copy
import os
import shutil
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from d2ext.checkpoint.formats import CheckpointFile, may_have_metadata, read_file
from d2ext.checkpoint.formats.integrity import append_seal
from d2ext.checkpoint.importers.mmdet import mmdet_metadata
from d2ext.checkpoint.importing import import_weights
from d2ext.checkpoint.rng import RNGState
from d2ext.checkpoint.settings import SETTINGS_KEY, apply_settings, settings_of_parts
from d2ext.config import paths as _paths  # noqa: F401  makes d2ext:// known
from d2ext.errors import UserError

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

METADATA_KEY = "metadata"
_COUNTERS = ".num_batches_tracked"  # of batch norm; without meaning to fixed statistics


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer plus atomic writing, class names, RNG states, one-line errors, and
    the checkpoints of other programs, see `d2ext.checkpoint.importing`.

    Nothing in a file can run.

    Args:
        model: the module, wrapped in DDP or not.
        save_dir: output folder.
        metadata: plain values stored beside the weights; `thing_classes` (list of names) is what
            the predictor reads back.
        weights: gives the state dict to save as `model`; default: that of the module.
        checkpointables: as in detectron2; the trainer is passed as `trainer=`.

    `save` is collective: every process calls it, because each contributes its RNG state.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        metadata: dict[str, Any] | None = None,
        save_to_disk: bool | None = None,
        weights: Callable[[], dict[str, torch.Tensor]] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.metadata = dict(metadata or {})
        self._weights = weights or (lambda: self.model.state_dict())
        self._source = ""
        self._file: CheckpointFile | None = None
        self._complete = False
        self._missing: list[str] = []

    def save(self, name: str, *, gather: bool = True, **kwargs: Any) -> None:
        """Write `save_dir/name.pth` through a temporary file, then tag it as the last one.

        Args:
            name: of the file, without `.pth`.
            gather: False to store the RNG states that were gathered last; `save` is then not
                collective.
            kwargs: further values to store.

        Raises:
            UserError: the disk is full, or the folder cannot be written; names the free space.
        """
        for checkpointable in self.checkpointables.values():
            if gather and isinstance(checkpointable, RNGState):
                checkpointable.gather()
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self._weights(), METADATA_KEY: self.metadata}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        self._write(name, data)
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write the model and its metadata without the state of the training, and leave the tag of
        the last checkpoint. Not collective; raises as `save`."""
        if self.save_dir and self.save_to_disk:
            data = {"model": self._weights(), METADATA_KEY: self.metadata}
            self._write(name, {**data, **kwargs})

    def _write(self, name: str, data: dict[str, Any]) -> None:
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda f: save_sealed(data, f))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make a file of the folder the one that `--resume` continues from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda f: f.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the named checkpointables (default: all).

        Args:
            path: a file of any format that `d2ext.checkpoint.formats` reads, an address such
                as `https://...`, `detectron2://...` or `d2ext://...`, or `""` to load
                nothing.
            checkpointables: names given to the constructor.

        Returns:
            What else the file holds.

        Raises:
            UserError: the file is missing, cannot be read, or is not for this model.
        """
        self._source = path
        if path:
            self.check_existence(path)
        try:
            return super().load(path, checkpointables)
        except UserError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError) as error:  # of load_state_dict
            raise UserError(
                f"checkpoint '{path}' does not fit this run: {_reason(error)}"
            ) from error
        finally:
            self._file = None

    def load_complete(self, path: str) -> dict[str, Any]:
        """As `load(path, [])`, for evaluation and prediction: nothing may keep random weights.

        Raises:
            UserError: as `load`, or the file lacks parameters of the model.
        """
        self._complete = True
        try:
            rest = self.load(path, checkpointables=[])
        finally:
            self._complete = False
        if self._missing:
            raise UserError(
                f"checkpoint '{path}' lacks {len(self._missing)} of the model's parameters, e.g. "
                f"'{self._missing[0]}'; name one of the whole model in MODEL.WEIGHTS (yaml) or "
                "train.init_checkpoint (lazy)"
            )
        return rest

    def continue_from(self, path: str) -> dict[str, Any]:
        """As `load(path)`, to continue a training: the model must be the one that was trained.

        Raises:
            UserError: as `load`, or a parameter of the model is not in the file.
        """
        rest = self.load(path)
        if self._missing:
            raise UserError(
                f"checkpoint '{path}' is of another network: it lacks {len(self._missing)} of this "
                f"one's parameters, e.g. '{self._missing[0]}'; continue with the config and the "
                "data set that the run was started with"
            )
        return rest

    def note_parts(self) -> None:
        """Give the model what parts that were built with weights need, such as pixel statistics,
        and store it from now on."""
        lines, settings = apply_settings(self.model, settings_of_parts(self.model))
        for line in lines:
            self.logger.info("as the weights need it: %s", line)
        if settings:
            self.metadata[SETTINGS_KEY] = settings

    def check_existence(self, path: str) -> None:
        """Raise a `UserError` unless a file, or what an address names, is there."""
        local = _local_path(path, self.path_manager)
        if not os.path.isfile(local):
            what = "is a folder" if os.path.isdir(local) else "does not exist"
            raise UserError(
                f"checkpoint '{path}' {what}; set MODEL.WEIGHTS (yaml) or "
                "train.init_checkpoint (lazy) to a file, or to '' to start from random weights"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._file = read_file(filename)
        # The weights are mapped into memory and copied into the model; a training state is kept,
        # and must not depend on the file any longer.
        return {**copy.deepcopy(self._file.rest), "model": self._file.weights}

    def _load_model(self, checkpoint: dict[str, Any]):
        settings = _plain_dict(_plain_dict(checkpoint.get(METADATA_KEY)).get(SETTINGS_KEY))
        if self._is_foreign(checkpoint):
            settings = self._convert(checkpoint)
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
        self._check_finite()
        if settings:
            lines, settings = apply_settings(self.model, settings, self._source)
            for line in lines:
                self.logger.info("as the weights need it: %s", line)
            self.metadata[SETTINGS_KEY] = settings
        incompatible.unexpected_keys[:] = [
            key for key in incompatible.unexpected_keys if not key.endswith(_COUNTERS)
        ]
        return incompatible

    def _check_finite(self) -> None:
        """Raise a `UserError` if the model has got weights that no training can go on from."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"checkpoint '{self._source}' has NaN or infinite numbers in '{name}'; take "
                    "one from before its training diverged"
                )

    def _is_foreign(self, checkpoint: dict[str, Any]) -> bool:
        """Whether the names are those of another program (whose files detectron2 cannot match)."""
        if checkpoint.get("matching_heuristics", False):
            return False
        of_model = set(self.model.state_dict())
        return not any(name.removeprefix("module.") in of_model for name in checkpoint["model"])

    def _convert(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Put the weights of another program under the names of the model; their settings."""
        file = self._file
        assert file is not None  # it is being loaded
        file = CheckpointFile(self._source, file.format, file.weights, file.rest)
        conversion = import_weights(file, self.model)
        conversion.check(self._source, other_classes=not self._complete)
        self.logger.info("%s", conversion.summary())
        conflicts = conversion.having("conflict")
        for entry in conflicts:  # in log.txt; the console has one line
            self.logger.info("%s stays as it is: %s", entry.target, entry.note)
        if conflicts:
            self.logger.warning(
                "%d arrays have another shape in the file, as with other classes, and start anew, "
                "e.g. %s: %s",
                len(conflicts),
                conflicts[0].target,
                conflicts[0].note,
            )
        for line in conversion.notes:
            self.logger.warning("%s", line)
        checkpoint["model"] = conversion.weights
        self.metadata["imported_from"] = conversion.metadata["imported_from"]
        return conversion.settings


def _plain_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, collections.abc.Mapping) else {}


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def save_sealed(data: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save` with a checksum of the whole file, see `d2ext.checkpoint.formats.integrity`."""
    torch.save(data, file)
    append_seal(file, archive=True)


def write_atomically(path: str, write: Callable) -> None:
    """Write a file so that a reader, or a restart after a crash, sees the old or the new one whole.

    What a crash leaves behind under the temporary name is overwritten by the next attempt.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "w+b") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or _reason(cause)
        raise UserError(f"cannot write '{path}': {reason}{_free_space(path)}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _free_space(path: str) -> str:
    """Words about the disk of a file; nothing if its folder is not there."""
    try:
        usage = shutil.disk_usage(os.path.dirname(os.path.abspath(path)))
    except OSError:
        return ""
    return f" ({usage.free / 2**20:.0f} MiB are free on that disk)"


def read_metadata(path: str) -> dict[str, Any]:
    """The `metadata` entry of a checkpoint written by `Checkpointer` or the converter, or what
    MMDetection stores of its kind; else `{}`.

    Weights stay on disk (memory-mapped), so this is quick for large files too. Checksums are left
    to whoever loads the weights, and so is what is wrong with the file.

    Args:
        path: a file of any format, or an address as for `Checkpointer.load`.
    """
    try:
        local = _local_path(path, PathManager) if path else ""
        if not local or not os.path.isfile(local) or not may_have_metadata(local):
            return {}
        file = read_file(local, check=False)
    except UserError:
        return {}
    return _plain_dict(file.rest.get(METADATA_KEY)) or mmdet_metadata(file)


def _local_path(path: str, manager: Any) -> str:
    """The file of an address, which is downloaded unless it was; of a path, itself."""
    if "://" not in path:
        return path
    try:
        return manager.get_local_path(path)
    except UserError:
        raise
    except Exception as error:  # whatever the network makes of it
        raise UserError(
            f"cannot download '{path}' ({_reason(error)}); get the file in another way and "
            "name it in MODEL.WEIGHTS (yaml) or train.init_checkpoint (lazy)"
        ) from error
