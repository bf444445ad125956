"""Reads and writes `.safetensors` files. The library comes with the extra `importers`."""

import json
import mmap
from typing import Any

import torch

from d2ext.checkpoint.formats.common import FormatError, require_library
from d2ext.checkpoint.formats.integrity import UNSEALED, fill_seal

_METADATA = "metadata"  # JSON text, in a header that holds only texts


def is_safetensors(data: mmap.mmap) -> bool:
    """Whether a file begins with the length of a JSON object that fits into it."""
    return int.from_bytes(data[:8], "little") <= len(data) - 8 and data[8:9] == b"{"


def read_safetensors(path: str, data: mmap.mmap) -> dict[str, Any]:
    """`model`: tensors by name, which share the mapped file; beside it the texts of the header,
    `metadata` as the values it was written from."""
    library = require_library("safetensors")
    try:
        with library.safe_open(path, framework="pt") as file:
            content = {**(file.metadata() or {}), "model": {}}
            for name in file.keys():
                content["model"][name] = file.get_tensor(name)
    except library.SafetensorError as error:
        raise FormatError(str(error)) from error
    try:
        content[_METADATA] = json.loads(content[_METADATA])
    except (KeyError, ValueError):
        pass  # none, or another program's
    return content


def dump_safetensors(weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """The content of a file; the tensors are contiguous and share no memory.

    Raises:
        FormatError: safetensors is not installed.
    """
    save = require_library("safetensors.torch", "safetensors").save
    header = {"format": "pt", _METADATA: json.dumps(metadata), "checksum": UNSEALED.decode()}
    return fill_seal(save(weights, header))
