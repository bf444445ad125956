"""Readers of checkpoint files of other programs. None executes anything of a file, and none needs
the program that wrote it."""

import collections.abc
import dataclasses
import mmap
from typing import Any

import numpy as np
import torch

from d2ext.checkpoint.formats.caffemodel import read_caffemodel
from d2ext.checkpoint.formats.common import FormatError, map_file
from d2ext.checkpoint.formats.hdf5 import SIGNATURE as HDF5_SIGNATURE
from d2ext.checkpoint.formats.hdf5 import read_hdf5
from d2ext.checkpoint.formats.integrity import check_integrity
from d2ext.checkpoint.formats.mxnet_params import MAGIC as MXNET_MAGIC
from d2ext.checkpoint.formats.mxnet_params import read_mxnet_params
from d2ext.checkpoint.formats.pickles import read_pickle
from d2ext.checkpoint.formats.safetensors_files import is_safetensors, read_safetensors
from d2ext.checkpoint.formats.torch_files import LEGACY_MAGIC, read_legacy_file, read_zip_file
from d2ext.errors import UserError

__all__ = ["CheckpointFile", "FormatError", "detect_format", "may_have_metadata", "read_file"]

_READERS = {
    "torch": read_zip_file,
    "torch-legacy": read_legacy_file,
    "pickle": read_pickle,
    "safetensors": read_safetensors,
    "mxnet": read_mxnet_params,
    "caffemodel": read_caffemodel,
    "hdf5": read_hdf5,
}
_ONLY_WEIGHTS = ("mxnet", "caffemodel", "hdf5")


@dataclasses.dataclass
class CheckpointFile:
    """The content of a file.

    Attributes:
        path: of the file.
        format: "torch", "torch-legacy", "pickle", "safetensors", "mxnet", "caffemodel" or "hdf5".
        weights: tensors by the names of the program that wrote them.
        rest: whatever else there is (`meta` of MMDetection, `trainer` of ours, ...).
    """

    path: str
    format: str
    weights: dict[str, torch.Tensor]
    rest: dict[str, Any] = dataclasses.field(default_factory=dict)


def detect_format(path: str, data: mmap.mmap) -> str:
    """The format of a file, from its first bytes; its name only tells Caffe's apart, which have no
    mark of their own.

    Raises:
        FormatError: none is known.
    """
    head = data[:8]
    if head[:4] == b"PK\x03\x04":
        return "torch"
    if head == MXNET_MAGIC:
        return "mxnet"
    if head == HDF5_SIGNATURE:
        return "hdf5"
    if data[2:14] == LEGACY_MAGIC:
        return "torch-legacy"
    if is_safetensors(data):
        return "safetensors"
    if path.endswith(".caffemodel"):
        return "caffemodel"
    if head[:1] == b"\x80" or path.endswith(".pkl"):
        return "pickle"
    raise FormatError(
        "it is none of: .pth, detectron2's .pkl, .safetensors, MXNet's .params, .caffemodel, "
        ".caffemodel.h5"
    )


def may_have_metadata(path: str) -> bool:
    """Whether the format of a local file has room for more than weights.

    Raises:
        UserError: the format is not known, or the file cannot be opened.
    """
    try:
        return detect_format(path, map_file(path)) not in _ONLY_WEIGHTS
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint '{path}' cannot be read: {error}") from error


def read_file(path: str, check: bool = True) -> CheckpointFile:
    """Read a checkpoint of any known format.

    Args:
        path: local file.
        check: compare its checksums, if it has any; False where whoever uses the weights does.

    Raises:
        UserError: the file is missing, damaged, of an unknown format or without weights, or its
            library is not installed; one line.
    """
    try:
        data = map_file(path)
        kind = detect_format(path, data)
        if check:
            check_integrity(path, kind, data)
        content = _READERS[kind](path, data)
        if kind in _ONLY_WEIGHTS:
            return CheckpointFile(path, kind, content)
        return _unwrap(path, kind, content)
    except UserError:
        raise
    except Exception as error:  # whatever the libraries make of a damaged file
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if isinstance(error, OSError):
            reason = error.strerror or reason
        raise UserError(f"checkpoint '{path}' cannot be read: {reason}") from error


def _unwrap(path: str, kind: str, content: Any) -> CheckpointFile:
    """Find the weights in what torch or pickle stored: ours and detectron2's are under "model",
    MMDetection's under "state_dict", Caffe2's under "blobs", pycls' under "model_state",
    torchvision's at the top."""
    rest: dict[str, Any] = {}
    weights = content
    if isinstance(content, collections.abc.Mapping):
        for key in ("model", "state_dict", "blobs", "model_state"):
            if key in content and not isinstance(content[key], (torch.Tensor, np.ndarray)):
                rest = {k: v for k, v in content.items() if k != key}
                weights = content[key]
                if key == "model_state":
                    rest.update({"__author__": "pycls", "matching_heuristics": True})
                break
        if kind == "pickle" and "__author__" not in rest:
            rest.update({"__author__": "Caffe2", "matching_heuristics": True})
    if not isinstance(weights, collections.abc.Mapping):
        wrong = {"model": weights}
    else:
        weights = {k: v for k, v in weights.items() if not _is_momentum(k, kind)}
        wrong = {k: v for k, v in weights.items() if not _is_weight(v)}
        wrong.update({str(k): k for k in weights if not isinstance(k, str)})
    if wrong:
        name, value = next(iter(wrong.items()))
        raise UserError(
            f"checkpoint '{path}' is not of the form {{'model': {{name: tensor}}}}: "
            f"'{str(name)[:60]}' is a {_describe(value)}"
        )
    tensors = {
        k: torch.from_numpy(np.asarray(v)) if isinstance(v, np.ndarray) else v.detach()
        for k, v in weights.items()
    }
    return CheckpointFile(path, kind, tensors, rest)


def _is_momentum(name: Any, kind: str) -> bool:
    return kind == "pickle" and isinstance(name, str) and name.endswith("_momentum")


def _is_weight(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _describe(value: Any) -> str:
    return getattr(value, "source", type(value).__name__)
