"""What the file readers share: a memory-mapped file, arrays as tensors without copies, libraries
that may be absent, and the error of a file that is not what it should be."""

import importlib
import math
import mmap
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch


class FormatError(ValueError):
    """A file breaks the rules of its format; the text completes "cannot be read: ..."."""


def require_library(module: str, package: str = "") -> ModuleType:
    """Import a library that is part of the extra `importers`.

    Args:
        package: its name in the package index, where that is another one.

    Raises:
        FormatError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FormatError(
            f"this needs {package or module}; pip install 'd2ext[importers]'"
        ) from error


def map_file(path: str) -> mmap.mmap:
    """A file mapped into memory copy-on-write: the file itself never changes."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)


def as_tensor(data: memoryview, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Interpret bytes as a tensor; they are shared if alignment and byte order allow it.

    Args:
        data: exactly the bytes of the array, in C order.
        dtype: numpy's name with byte order such as "<f4".
        shape: may be empty, for a scalar.

    Raises:
        FormatError: the number of bytes does not fit.
    """
    kind = np.dtype(dtype)
    if len(shape) > 32 or any(n < 0 for n in shape):
        raise FormatError(f"{str(tuple(shape))[:60]} is no shape of an array")
    if math.prod(shape) * kind.itemsize != len(data):
        raise FormatError(
            f"an array of shape {tuple(shape)} has {len(data) // kind.itemsize} values"
        )
    array = np.frombuffer(data, kind).reshape(tuple(shape))
    if not (array.flags.aligned and array.flags.writeable and kind.isnative):
        array = array.astype(kind.newbyteorder("="))
    return torch.from_numpy(array)
