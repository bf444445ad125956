"""Reads HDF5 files, as Caffe writes them (`.caffemodel.h5`), by h5py. The library comes with the
extra `importers`."""

import mmap
from typing import Any

import torch

from d2ext.checkpoint.formats.common import FormatError, as_tensor, require_library

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LARGEST_RATIO = 100  # of an unpacked array to the file; weights are hardly compressible


def read_hdf5(path: str, data: mmap.mmap) -> dict[str, torch.Tensor]:
    """Arrays by path without the leading slash, e.g. `data/conv1_1/0`."""
    h5py = require_library("h5py")
    found: dict[str, torch.Tensor] = {}
    seen = set()

    def visit(group: Any, prefix: str) -> None:
        for name in list(group):
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise FormatError(f"'{prefix}{name}' is a link to elsewhere")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise FormatError("one object has several names")
            seen.add(address)
            if isinstance(item, h5py.Group):
                visit(item, f"{prefix}{name}/")
            elif isinstance(item, h5py.Dataset):
                found[prefix + name] = _read_array(h5py, item, memoryview(data))

    with h5py.File(path, "r", locking="best-effort") as file:
        seen.add(h5py.h5o.get_info(file.id).addr)
        visit(file, "")
    return found


def _read_array(h5py: Any, array: Any, data: memoryview) -> torch.Tensor:
    kind, size = array.dtype, array.id.get_storage_size()
    count = (array.size or 0) * kind.itemsize
    if kind.kind not in "fiu" or array.shape is None:
        raise FormatError(f"'{array.name[:60]}' is no array of numbers")
    if array.is_virtual or array.external or (count and not size):
        raise FormatError(f"the values of '{array.name[:60]}' are not in the file")
    if count > _LARGEST_RATIO * len(data):
        raise FormatError(f"'{array.name[:60]}' would unfold into {count} bytes")
    offset = array.id.get_offset()
    # As they are in the file: no copy.
    if offset is not None and size == count and array.id.get_type() == h5py.h5t.py_create(kind):
        return as_tensor(data[offset : offset + count], kind.str, array.shape)
    return as_tensor(memoryview(array[()].tobytes()), kind.str, array.shape)
