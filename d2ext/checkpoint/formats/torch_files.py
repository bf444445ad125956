"""Reads what `torch.save` wrote, by `torch.load(weights_only=True)`: its present form (a zip
archive), mapped into memory, and the one before torch 1.6 (pickles followed by raw storages)."""

import io
import mmap
import pickle
import re
import tarfile
import warnings
import zipfile
from typing import Any, BinaryIO

import torch

from d2ext.checkpoint.formats.common import FormatError
from d2ext.checkpoint.formats.pickles import Opaque, Unpickler

LEGACY_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def read_zip_file(path: str, data: mmap.mmap) -> Any:
    """The object in a file of torch >= 1.6; its tensors stay in the file, mapped copy-on-write."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.lower(): info for info in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise FormatError("the archive has two files of one name")
        mains = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
        if len(mains) != 1:
            raise FormatError("the archive is not of torch.save: it has no data.pkl")
        prefix = mains[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in entries:
            raise FormatError("it is a TorchScript program, which is code rather than weights")
        for info in entries.values():
            if info.compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"'{info.filename[:60]}' is compressed, which torch never does")
        scan = _look_through(io.BytesIO(archive.read(entries[mains[0]])), len(data))
    for key, size in scan.storages.items():  # torch trusts them
        info = entries.get(f"{prefix}data/{key}".lower())
        if info is None:
            raise FormatError(f"storage '{key[:40]}' is missing")
        if info.file_size != size:
            raise FormatError(f"storage '{key[:40]}' has {info.file_size} bytes instead of {size}")
    return _load(path, [scan], mmap=True)


def read_legacy_file(path: str, data: mmap.mmap) -> Any:
    """The object in a file of torch < 1.6."""
    if tarfile.is_tarfile(path):  # of torch < 0.1.10
        raise FormatError("it is a tar archive")
    # A magic number, a version, the system, the object, and the names of its storages.
    return _load(path, [_look_through(data, len(data)) for _ in range(5)])


def _look_through(stream: BinaryIO, size: int) -> Unpickler:
    unpickler = Unpickler(stream, size)
    unpickler.load()
    return unpickler


def _load(path: str, scans: list[Unpickler], **options: Any) -> Any:
    kinds = [kind for scan in scans for kind in scan.stand_ins.values()]
    made: list[Any] = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Opaque):
            kind.made = made
    safe = torch.serialization
    before = list(safe.get_safe_globals())
    safe.clear_safe_globals()
    try:
        safe.add_safe_globals(kinds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages and protocols
            content = torch.load(path, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:  # its reason is between advice to unpickle all the same
        parts = re.split(r"WeightsUnpickler error:|\n\n", str(error))
        reasons = [x for x in parts if x.strip() and "documentation" not in x]
        raise FormatError(reasons[-1] if reasons else "torch refuses it") from error
    finally:
        safe.clear_safe_globals()
        safe.add_safe_globals(before)
    for value in made:  # attributes that torch set may hide methods
        vars(value).clear() if isinstance(value, dict) else None
    return content
