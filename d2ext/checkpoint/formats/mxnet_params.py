"""Reads MXNet's `.params` files: a list of arrays followed by the list of their names. MXNet is
no longer developed, and no library besides it reads them."""

import math
import mmap
import struct

import torch

from d2ext.checkpoint.formats.common import FormatError, as_tensor

MAGIC = (0x112).to_bytes(8, "little")
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_TYPES = ("<f4", "<f8", "<f2", "|u1", "<i4", "|i1", "<i8")


class _Bytes:
    """Reads numbers and blocks one after the other, never beyond the end."""

    def __init__(self, data: memoryview):
        self.data = data

    def take(self, n: int) -> memoryview:
        """The next `n` bytes."""
        if not 0 <= n <= len(self.data):
            raise FormatError(f"the file is truncated: {n} bytes are wanted, {len(self.data)} left")
        taken, self.data = self.data[:n], self.data[n:]
        return taken

    def unpack(self, layout: str) -> tuple:
        """The next numbers, little-endian; `layout` as in `struct`."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def count(self, smallest: int) -> int:
        """The length of a list whose items have at least `smallest` bytes."""
        (count,) = self.unpack("Q")
        if count * smallest > len(self.data):
            raise FormatError(f"the file is truncated: it should hold {count} items")
        return count


def read_mxnet_params(path: str, data: mmap.mmap) -> dict[str, torch.Tensor]:
    """Arrays by name, e.g. `arg:conv1_weight` and `aux:bn_conv1_moving_mean`.

    Understands the array headers of MXNet before 0.12 (no magic number, 32-bit sizes), and those
    called V1 and V2.
    """
    source = _Bytes(memoryview(data))
    source.take(16)  # the magic number, and a reserved one
    arrays = [_read_array(source) for _ in range(source.count(smallest=4))]
    names = []
    for _ in range(source.count(smallest=8)):
        names.append(bytes(source.take(*source.unpack("Q"))).decode("utf-8"))
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise FormatError(f"it has {len(arrays)} arrays, but {len(set(names))} names")
    return dict(zip(names, arrays))


def _read_array(source: _Bytes) -> torch.Tensor:
    (first,) = source.unpack("I")
    if first == _V3:
        raise FormatError("arrays of MXNet 2 are not supported")
    if first == _V2 and source.unpack("i") != (0,):
        raise FormatError("sparse arrays are not supported")
    dimensions, size = (source.unpack("I")[0], "q") if first in (_V1, _V2) else (first, "I")
    if dimensions > 32:
        raise FormatError(f"an array with {dimensions} dimensions")
    if dimensions == 0:
        return torch.empty(0)
    shape = source.unpack(f"{dimensions}{size}")
    *_, kind = source.unpack("3i")  # the device on which the array was, and its type
    if not 0 <= kind < len(_TYPES):
        raise FormatError(f"an array of the unknown type {kind}")
    if min(shape) < 0:
        raise FormatError(f"{shape} is no shape of an array")
    return as_tensor(source.take(math.prod(shape) * int(_TYPES[kind][-1])), _TYPES[kind], shape)
