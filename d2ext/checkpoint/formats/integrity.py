"""Were the bytes of a file changed since it was written? Our own files end in, or hold, a checksum
of all their bytes; `torch.save` notes one for each part of an archive.

A seal is `d2ext-crc32:XXXXXXXX:d2ext-sealed`, the CRC-32 of the whole file with eight zeros in its
place. It is the comment of a zip archive, follows the end of a pickle, and is a text in the header
of a `.safetensors`, so that other programs read these files as before. Either of its ends tells
that a file has one.
"""

import hashlib
import mmap
import os
import re
import zipfile
import zlib
from typing import BinaryIO

from d2ext.checkpoint.formats.common import FormatError

_START, _END = b"d2ext-crc32:", b":d2ext-sealed"
_DIGITS = 8
UNSEALED = _START + b"0" * _DIGITS + _END
_DAMAGED = "its checksum is wrong, the file is damaged; get it again, or take another checkpoint"


def append_seal(file: BinaryIO, archive: bool) -> None:
    """Put a seal behind what was written to a file, which is open for reading and writing.

    Args:
        archive: whether it is a zip archive, which is told the length of what follows it.
    """
    if archive:
        file.seek(-2, os.SEEK_END)
        file.write(len(UNSEALED).to_bytes(2, "little"))
    file.seek(0, os.SEEK_END)
    file.write(UNSEALED)
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = len(data) - len(UNSEALED)
        digits = _checksum(data, place)
    file.seek(place + len(_START))
    file.write(digits)
    file.seek(0, os.SEEK_END)


def fill_seal(data: bytes) -> bytes:
    """A file that holds `UNSEALED`, with the checksum in its place."""
    place = data.index(UNSEALED)
    start = place + len(_START)
    return data[:start] + _checksum(data, place) + data[start + _DIGITS :]


def check_integrity(path: str, kind: str, data: mmap.mmap) -> None:
    """Compare the seal of a file; without one, the checksums of a zip archive.

    Args:
        kind: the format, see `d2ext.checkpoint.formats.CheckpointFile`.

    Raises:
        FormatError: a checksum is wrong, or the end of a file is missing.
    """
    if kind == "safetensors":
        place = _find(data, 8, 8 + int.from_bytes(data[:8], "little"))
    else:
        place = _find(data, max(0, len(data) - 2 * len(UNSEALED)), len(data))
        if place is not None and place != len(data) - len(UNSEALED):
            raise FormatError("its last bytes are missing, or others follow them")
    if place is not None:
        start = place + len(_START)
        if data[start : start + _DIGITS] != _checksum(data, place):
            raise FormatError(_DAMAGED)
    elif kind == "torch":
        _check_archive(path, len(data))
    elif kind == "torch-legacy":
        _check_name(path, data)


def _find(data: mmap.mmap, first: int, last: int) -> int | None:
    """Where a seal begins, by either of its ends."""
    place = data.rfind(_START, first, last)
    if place < 0:
        place = data.rfind(_END, first, last)
        place = place - len(_START) - _DIGITS if place >= 0 else -1
    return place if place >= 0 else None


def _checksum(data: bytes | mmap.mmap, place: int) -> bytes:
    start = place + len(_START)
    with memoryview(data) as view, view[:start] as before, view[start + _DIGITS :] as after:
        value = zlib.crc32(after, zlib.crc32(b"0" * _DIGITS, zlib.crc32(before)))
    return b"%08x" % value


def _check_name(path: str, data: mmap.mmap) -> None:
    """Compare a file with the beginning of its SHA-256, which the model zoos of MMDetection and of
    torchvision put into its name; older files have no other checksum."""
    named = re.fullmatch(r".+-([0-9a-f]{8})\.pth", os.path.basename(path))
    if named and not hashlib.sha256(data).hexdigest().startswith(named[1]):
        raise FormatError(
            f"it is not the file whose checksum begins with {named[1]}, as its name says; get it "
            "again, or rename it if it was changed on purpose"
        )


def _check_archive(path: str, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        # Others are refused by who reads them: they need no memory and no time here.
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            return
        if sum(part.file_size for part in parts) > size:
            raise FormatError("the parts of the archive are larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise FormatError(f"the checksum of its part '{damaged[:60]}' is wrong, it is damaged")
