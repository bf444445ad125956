"""Reads Caffe's binary `.caffemodel` files by protobuf, which skips all fields but the few that
hold weights. The library comes with the extra `importers`."""

import functools
import mmap
from typing import Any

import numpy as np
import torch

from d2ext.checkpoint.formats.common import FormatError, as_tensor, require_library

# Messages of caffe.proto: {field: (number, type)}, "*" for repeated ones. Arrays of numbers look
# like bytes in a file, and are taken as such: nothing is converted number by number.
_MESSAGES = {
    "Shape": {"dim": (1, "int64*")},
    "Blob": {
        **{name: (i, "int32") for i, name in enumerate(("num", "channels", "height", "width"), 1)},
        "data": (5, "bytes*"),
        "double_data": (8, "bytes*"),
        "shape": (7, "Shape"),
    },
    "Layer": {"name": (1, "string"), "blobs": (7, "Blob*")},
    "V1Layer": {"name": (4, "string"), "blobs": (6, "Blob*")},
    "Net": {"layers": (2, "V1Layer*"), "layer": (100, "Layer*")},
}


@functools.cache
def _net_class() -> type:
    """The class of a whole network, made from the table above."""
    names = ("descriptor_pb2", "descriptor_pool", "message_factory")
    descriptors, pools, factory = (
        require_library(f"google.protobuf.{x}", "protobuf") for x in names
    )
    field_type = descriptors.FieldDescriptorProto
    file = descriptors.FileDescriptorProto(name="caffe.proto", package="caffe")
    for title, fields in _MESSAGES.items():
        message = file.message_type.add(name=title)
        for name, (number, kind) in fields.items():
            field = message.field.add(name=name, number=number)
            field.label = 3 if kind.endswith("*") else 1  # repeated or optional
            kind = kind.rstrip("*")
            if kind in _MESSAGES:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = getattr(field_type, f"TYPE_{kind.upper()}")
    pool = pools.DescriptorPool()
    pool.Add(file)
    return factory.GetMessageClass(pool.FindMessageTypeByName("caffe.Net"))


def read_caffemodel(path: str, data: mmap.mmap) -> dict[str, torch.Tensor]:
    """Blobs by layer and position: `conv1_1.0` is a weight, `conv1_1.1` its bias.

    Weights of fully connected layers in old files, stored as 1 x 1 x outputs x inputs, become
    outputs x inputs, and biases one-dimensional.
    """
    net = _net_class()()
    try:
        net.ParseFromString(data[:])
    except require_library("google.protobuf.message", "protobuf").DecodeError as error:
        raise FormatError("it is not a protocol buffer") from error
    blobs: dict[str, torch.Tensor] = {}
    for layer in (*net.layers, *net.layer):
        for index, blob in enumerate(layer.blobs):
            if f"{layer.name}.{index}" in blobs:
                raise FormatError(f"two layers are called '{layer.name[:60]}'")
            blobs[f"{layer.name}.{index}"] = _read_blob(blob)
    if not (net.layers or net.layer):
        raise FormatError("it has no Caffe layers")
    return blobs


def _read_blob(blob: Any) -> torch.Tensor:
    kind = "<f8" if blob.double_data else "<f4"
    values = bytearray().join(blob.double_data or blob.data) or _single_numbers(blob)
    if blob.HasField("shape"):
        return as_tensor(values, kind, list(blob.shape.dim))
    return as_tensor(
        values, kind, _modern_shape([blob.num, blob.channels, blob.height, blob.width])
    )


def _single_numbers(blob: Any) -> bytearray:
    """Data of the oldest files: numbers one by one, each with a tag of its own (5, as 32 bits)."""
    unknown = require_library("google.protobuf.unknown_fields", "protobuf").UnknownFieldSet(blob)
    numbers = [field.data for field in unknown if (field.field_number, field.wire_type) == (5, 5)]
    return bytearray(np.array(numbers, "<u4"))


def _modern_shape(legacy: list[int]) -> list[int]:
    if legacy[:3] == [1, 1, 1]:
        return legacy[3:]
    return legacy[2:] if legacy[:2] == [1, 1] else legacy
