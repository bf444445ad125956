"""Reads what ``torch.save`` wrote, in its present form (a zip archive) and in the one before torch
1.6 (pickles followed by raw storages), without executing anything of the file."""

import io
import zipfile
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from .common import Bytes, FormatError, as_tensor
from .pickles import Global, PickleReader

__all__ = ["LEGACY_MAGIC", "is_legacy_file", "read_legacy_file", "read_zip_file"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# Storage classes of torch: how their elements are stored.
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
    "UntypedStorage": "|u1",
}


def _item_size(dtype) -> int:
    return 2 if dtype is torch.bfloat16 else int(dtype[-1])


def _storage_id(pid: Any) -> Tuple[Any, str, int]:
    """Element type, key and number of elements of a reference to a storage."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise FormatError("a reference to something that is no storage")
    _, kind, key, _, count = pid[:5]
    dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str) or not isinstance(count, int) or count < 0:
        raise FormatError(f"a storage of the unknown type '{getattr(kind, 'name', kind)}'")
    return dtype, key, count


def read_zip_file(data: memoryview) -> Any:
    """The object in a file of torch >= 1.6; its tensors share the memory of ``data``."""
    with zipfile.ZipFile(_Seekable(data)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    mains = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
    if len(mains) != 1:
        raise FormatError("the archive is not of torch.save: it has no data.pkl")
    if any(name.endswith("/constants.pkl") for name in entries):
        raise FormatError("it is a TorchScript program, which is code rather than weights")
    prefix = mains[0][: -len("data.pkl")]
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(_content(data, order)) != b"little":
        raise FormatError("it is of a big-endian machine")
    storages: Dict[str, torch.Tensor] = {}

    def persistent(pid: Any) -> torch.Tensor:
        dtype, key, count = _storage_id(pid)
        if key not in storages:
            info = entries.get(f"{prefix}data/{key}")
            if info is None:
                raise FormatError(f"storage '{key[:40]}' is missing")
            storages[key] = as_tensor(_content(data, info), dtype, (count,))
        return storages[key]

    main = io.BytesIO(_content(data, entries[mains[0]]))
    return PickleReader(persistent, len(data)).read(main)


def _content(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an archive's member, in place."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise FormatError(f"'{info.filename[:60]}' is compressed, which torch never does")
    header = Bytes(data, info.header_offset)
    signature, *_, name, extra = header.unpack("4s5H3I2H")
    if signature != b"PK\x03\x04":
        raise FormatError("the archive is damaged")
    header.take(name + extra)
    return header.take(info.file_size)


class _Seekable(io.RawIOBase):
    """A buffer as a read-only file, without a copy."""

    def __init__(self, data: memoryview):
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise FormatError("the archive is damaged")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def read(self, size: int = -1) -> bytes:
        left = max(len(self._data) - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        part = bytes(self._data[self._position : self._position + size])
        self._position += size
        return part

    def readline(self, size: int = -1) -> bytes:
        end = self._position
        while end < len(self._data):
            chunk = bytes(self._data[end : end + 4096])
            found = chunk.find(b"\n")
            if found >= 0:
                return self.read(end + found + 1 - self._position)
            end += len(chunk)
        return self.read()


def read_legacy_file(data: memoryview) -> Any:
    """The object in a file of torch < 1.6; its tensors share the memory of ``data`` as far as they
    are aligned."""
    stream = _Seekable(data)

    def read(persistent: Optional[Callable] = None) -> Any:
        return PickleReader(persistent, len(data)).read(stream)

    if read() != LEGACY_MAGIC:
        raise FormatError("it is not a file of torch.save")
    version, system = read(), read()
    if version != 1001 or (isinstance(system, dict) and system.get("little_endian") is False):
        raise FormatError("it is of an unknown version of torch.save")
    # The storages follow the object that uses them: read it once for their types, then again.
    start, types = stream.tell(), {}

    def note(pid: Any) -> None:
        if pid and isinstance(pid, tuple) and pid[0] == "module":
            return None
        dtype, key, count = _storage_id(pid)
        types[key] = (dtype, count)

    read(note)
    keys: List[Any] = read()
    storages = {}
    rest = Bytes(data, stream.tell())
    for key in keys:
        if not isinstance(key, str) or key not in types:
            raise FormatError("it has a storage that no tensor uses")
        dtype, expected = types[key]
        count = rest.number("q")
        if count != expected:
            raise FormatError(f"storage '{key[:40]}' has {count} elements instead of {expected}")
        storages[key] = as_tensor(rest.take(count * _item_size(dtype)), dtype, (count,))

    def persistent(pid: Any) -> torch.Tensor:
        _, key, _ = _storage_id(pid)
        if key not in storages:
            raise FormatError(f"storage '{key[:40]}' is missing")
        if len(pid) > 5 and pid[5] is not None:
            _, offset, size = pid[5]
            return storages[key].narrow(0, offset, size)
        return storages[key]

    stream.seek(start)
    return PickleReader(persistent, len(data)).read(stream)


def is_legacy_file(data: memoryview) -> bool:
    """Whether a pickle is the beginning of a file of torch < 1.6, by its magic number."""
    return bytes(data[2:14]) == b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
