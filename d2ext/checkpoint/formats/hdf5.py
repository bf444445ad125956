"""Reads the HDF5 files that Caffe writes (``.caffemodel.h5``), without the HDF5 library.

Only what occurs there: the file format of HDF5 1.6 and 1.8 by default (superblock 0 or 1, groups as
symbol tables) with contiguous, uncompressed arrays of numbers. Section names below are those of
"HDF5 File Format Specification", version 2.
"""

from typing import Dict, Iterator, Set, Tuple

import torch

from .common import Bytes, FormatError, as_tensor, element_count

__all__ = ["SIGNATURE", "read_hdf5"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = (1 << 64) - 1
_DATASPACE, _DATATYPE, _LAYOUT, _CONTINUATION, _SYMBOL_TABLE = 0x1, 0x3, 0x8, 0x10, 0x11
_OTHER = (
    "it uses features of HDF5 that Caffe does not; write it again with "
    "h5py.File(..., libver='earliest') and plain arrays"
)


def read_hdf5(data: memoryview) -> Dict[str, torch.Tensor]:
    """Arrays by path without the leading slash, e.g. ``data/conv1_1/0``."""
    return _File(data).read()


class _File:
    """One file; ``seen`` holds the object headers on the way, so that no link leads in circles."""

    def __init__(self, data: memoryview):
        self.data = data
        self.seen: Set[int] = set()

    def at(self, address: int) -> Bytes:
        return Bytes(self.data, address)

    def read(self) -> Dict[str, torch.Tensor]:
        source = self.at(0)
        if bytes(source.take(8)) != SIGNATURE:
            raise FormatError("it is not an HDF5 file")
        version, _, _, _, _, offsets, lengths, _ = source.unpack("8B")
        if version > 1 or (offsets, lengths) != (8, 8):
            raise FormatError(_OTHER)
        source.take(8 if version == 0 else 12)  # sizes of tree nodes, flags
        base, _, end, _ = source.unpack("4Q")
        if base != 0 or end > len(self.data):
            raise FormatError("the file is truncated")
        _, header = source.unpack("2Q")  # entry of the root group
        found: Dict[str, torch.Tensor] = {}
        self._read_object(header, "", found)
        return found

    def _read_object(self, address: int, path: str, found: Dict[str, torch.Tensor]) -> None:
        if address in self.seen:
            raise FormatError("one object has several names")
        self.seen.add(address)
        shape = kind = values = None
        for message, content in self._messages(address):
            if message == _SYMBOL_TABLE:
                tree, heap = content.unpack("2Q")
                for name, header in self._links(tree, self._heap(heap)):
                    self._read_object(header, f"{path}/{name}" if path else name, found)
            elif message == _DATASPACE:
                shape = _read_shape(content)
            elif message == _DATATYPE:
                kind = _read_type(content)
            elif message == _LAYOUT:
                values = self._read_layout(content)
        if values is not None:
            if shape is None or kind is None:
                raise FormatError(f"array '{path[:60]}' has no shape or type")
            if element_count(shape) * int(kind[-1]) != len(values):
                raise FormatError(f"array '{path[:60]}' has another size than its shape {shape}")
            found[path] = as_tensor(values, kind, shape)

    def _messages(self, address: int) -> Iterator[Tuple[int, Bytes]]:
        """Messages of an object header (IV.A.1.a), continuations included."""
        source = self.at(address)
        version, _, count, _, size, _ = source.unpack("BBHIII")
        if version != 1:
            raise FormatError(_OTHER)
        blocks = [Bytes(source.take(size))]
        for block in blocks:
            while block.left() >= 8 and count:
                message, length, flags, _, _, _ = block.unpack("HHBBBB")
                content = Bytes(block.take(length))
                count -= 1
                if message == _CONTINUATION:
                    start, length = content.unpack("2Q")
                    blocks.append(Bytes(self.at(start).take(length)))
                elif flags & 2:
                    raise FormatError(_OTHER)  # a message that is shared with other objects
                else:
                    yield message, content

    def _heap(self, address: int) -> Bytes:
        """The names of a group (III.D)."""
        signature, _, size, _, start = self.at(address).unpack("4s4sQQQ")
        if signature != b"HEAP":
            raise FormatError("a group has no names")
        return Bytes(self.at(start).take(size))

    def _links(self, address: int, heap: Bytes) -> Iterator[Tuple[str, int]]:
        """Names and object headers of a group: a tree (III.A.1) of symbol table nodes (III.B)."""
        if address in self.seen:
            raise FormatError("a group leads in a circle")
        self.seen.add(address)
        source = self.at(address)
        if bytes(source.data[address : address + 4]) == b"SNOD":
            _, _, _, count = source.unpack("4sBBH")
            for _ in range(count):
                name, header, cache, _, _ = source.unpack("QQII16s")
                if cache == 2:
                    raise FormatError(_OTHER)  # a symbolic link
                end = bytes(heap.data[name:]).find(b"\0")
                if end < 0:
                    raise FormatError("a name has no end")
                yield bytes(heap.data[name : name + end]).decode("utf-8"), header
            return
        signature, kind, _, count, _, _ = source.unpack("4sBBHQQ")
        if signature != b"TREE" or kind != 0:
            raise FormatError("a group is damaged")
        for _ in range(count):
            _, child = source.unpack("2Q")
            yield from self._links(child, heap)

    def _read_layout(self, content: Bytes) -> memoryview:
        """Data layout message (IV.A.2.i)."""
        version, layout = content.unpack("BB")
        if version != 3 or layout > 1:
            raise FormatError(_OTHER)
        if layout == 0:
            return content.take(content.number("H"))
        address, size = content.unpack("2Q")
        if address == _UNDEFINED:  # never written, or empty
            if size:
                raise FormatError("an array has no values")
            return memoryview(bytearray())
        return self.at(address).take(size)


def _read_shape(content: Bytes) -> Tuple[int, ...]:
    """Dataspace message (IV.A.2.b)."""
    version, dimensions, flags = content.unpack("BBB")
    if version == 1:
        content.take(5)
    elif version == 2:
        if content.number("B") == 2:
            raise FormatError("an array without values")
    else:
        raise FormatError(_OTHER)
    return content.unpack(f"{dimensions}Q")


def _read_type(content: Bytes) -> str:
    """Datatype message (IV.A.2.d) of IEEE floats and integers, as numpy names it."""
    first, bits, _, _, size = content.unpack("BBBBI")
    kind = {0: "i" if bits & 8 else "u", 1: "f"}.get(first & 15)
    if kind is None or size not in ((2, 4, 8) if kind == "f" else (1, 2, 4, 8)):
        raise FormatError(_OTHER)
    return (">" if bits & 1 else "<") + kind + str(size)
