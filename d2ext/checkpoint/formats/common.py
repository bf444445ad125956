"""What the file readers share: a memory-mapped file with checked reads, arrays as tensors without
copies, and the error of a file that is not what it should be."""

import struct
from typing import Optional, Sequence, Tuple, Union

import numpy as np
import torch

__all__ = ["Bytes", "FormatError", "as_tensor", "map_file"]


class FormatError(ValueError):
    """A file breaks the rules of its format; the text completes "cannot be read: ..."."""


def map_file(path: str) -> memoryview:
    """The bytes of a file, mapped into memory copy-on-write: the file itself never changes."""
    with open(path, "rb") as f:
        if not f.read(1):
            raise FormatError("the file is empty")
    return memoryview(np.memmap(path, np.uint8, mode="c"))


def as_tensor(
    data: memoryview, dtype: Union[str, torch.dtype], shape: Sequence[int]
) -> torch.Tensor:
    """Interpret bytes as a tensor; they are shared if alignment and byte order allow it.

    Args:
        data: exactly the bytes of the array, in C order.
        dtype: numpy's name with byte order such as "<f4", or ``torch.bfloat16``.
        shape: may be empty, for a scalar.

    Raises:
        FormatError: the number of bytes does not fit.
    """
    half = dtype is torch.bfloat16  # numpy has no such type
    kind = np.dtype("<i2" if half else dtype)
    count = element_count(shape)
    if count * kind.itemsize != len(data):
        raise FormatError(
            f"an array of shape {tuple(shape)} needs {count * kind.itemsize} bytes, "
            f"the file has {len(data)}"
        )
    array = np.frombuffer(data, kind).reshape(tuple(shape))
    if not (array.flags.aligned and array.flags.writeable and kind.isnative):
        array = array.astype(kind.newbyteorder("="))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if half else tensor


def element_count(shape: Sequence[int]) -> int:
    """Product of the sizes, in Python's unlimited integers.

    Raises:
        FormatError: a size is negative, or there are more than 32.
    """
    if len(shape) > 32 or any(not isinstance(n, int) or n < 0 for n in shape):
        raise FormatError(f"{str(tuple(shape))[:60]} is no shape of an array")
    count = 1
    for n in shape:
        count *= n
    return count


class Bytes:
    """Reads numbers and blocks from a buffer, one after the other, never beyond its end.

    Args:
        data: the buffer.
        start, end: part of it to read; the whole by default.
    """

    def __init__(self, data: memoryview, start: int = 0, end: Optional[int] = None):
        self.data = data
        self.end = len(data) if end is None else end
        self.position = start
        if not 0 <= start <= self.end <= len(data):
            raise FormatError(f"it points to byte {max(start, self.end)} of {len(data)}")

    def left(self) -> int:
        """Number of bytes that are left."""
        return self.end - self.position

    def take(self, n: int) -> memoryview:
        """The next ``n`` bytes."""
        if not 0 <= n <= self.left():
            raise FormatError(f"the file is truncated: {n} bytes are wanted, {self.left()} left")
        self.position += n
        return self.data[self.position - n : self.position]

    def unpack(self, layout: str) -> Tuple:
        """The next numbers, little-endian; ``layout`` as in :mod:`struct`."""
        layout = "<" + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def number(self, kind: str) -> int:
        """The next number: one letter of :mod:`struct`, e.g. "I" for 32 bits without sign."""
        return self.unpack(kind)[0]
