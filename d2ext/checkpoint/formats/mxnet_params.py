"""Reads MXNet's ``.params`` files: a list of arrays followed by the list of their names."""

from typing import Dict

import torch

from .common import Bytes, FormatError, as_tensor, element_count

__all__ = ["MAGIC", "read_mxnet_params"]

MAGIC = (0x112).to_bytes(8, "little")
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_TYPES = ("<f4", "<f8", "<f2", "|u1", "<i4", "|i1", "<i8")


def read_mxnet_params(data: memoryview) -> Dict[str, torch.Tensor]:
    """Arrays by name, e.g. ``arg:conv1_weight`` and ``aux:bn_conv1_moving_mean``.

    Understands the array headers of MXNet before 0.12 (no magic number, 32-bit sizes), and those
    called V1 and V2.
    """
    source = Bytes(data)
    if bytes(source.take(8)) != MAGIC:
        raise FormatError("it is not a list of MXNet arrays")
    source.take(8)  # reserved
    arrays = []
    for _ in range(_count(source, smallest=4)):
        arrays.append(_read_array(source))
    names = []
    for _ in range(_count(source, smallest=8)):
        names.append(bytes(source.take(source.number("Q"))).decode("utf-8"))
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise FormatError(f"it has {len(arrays)} arrays, but {len(set(names))} names")
    return dict(zip(names, arrays))


def _count(source: Bytes, smallest: int) -> int:
    count = source.number("Q")
    if count * smallest > source.left():
        raise FormatError(f"the file is truncated: it should hold {count} items")
    return count


def _read_array(source: Bytes) -> torch.Tensor:
    first = source.number("I")
    if first == _V3:
        raise FormatError("arrays of MXNet 2 are not supported")
    if first == _V2 and source.number("i") != 0:
        raise FormatError("sparse arrays are not supported")
    if first in (_V1, _V2):
        dimensions, size = source.number("I"), "q"
    else:
        dimensions, size = first, "I"
    if dimensions > 32:
        raise FormatError(f"an array with {dimensions} dimensions")
    if dimensions == 0:
        return torch.empty(0)
    shape = source.unpack(f"{dimensions}{size}")
    source.take(8)  # the device on which the array was
    kind = source.number("i")
    if not 0 <= kind < len(_TYPES):
        raise FormatError(f"an array of the unknown type {kind}")
    nbytes = element_count(shape) * int(_TYPES[kind][-1])
    return as_tensor(source.take(nbytes), _TYPES[kind], shape)
