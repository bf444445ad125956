"""Reads Caffe's binary ``.caffemodel`` files: the few fields of its protocol buffers that hold
weights, straight from the wire format."""

from typing import Dict, Iterator, List, Tuple, Union

import torch

from .common import Bytes, FormatError, as_tensor, element_count

__all__ = ["read_caffemodel"]

# Field numbers of caffe.proto.
_NET_LAYERS_V1, _NET_LAYER = 2, 100
_LAYER_NAME, _LAYER_BLOBS = 1, 7
_V1_NAME, _V1_BLOBS = 4, 6
_BLOB_DATA, _BLOB_DOUBLE_DATA, _BLOB_SHAPE = 5, 8, 7
_BLOB_LEGACY_SHAPE = (1, 2, 3, 4)  # num, channels, height, width
_SHAPE_DIM = 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def read_caffemodel(data: memoryview) -> Dict[str, torch.Tensor]:
    """Blobs by layer and position: ``conv1_1.0`` is a weight, ``conv1_1.1`` its bias.

    Weights of fully connected layers in old files, stored as 1 x 1 x outputs x inputs, become
    outputs x inputs, and biases one-dimensional.
    """
    blobs: Dict[str, torch.Tensor] = {}
    known = False
    for field, value in _fields(Bytes(data)):
        if field not in (_NET_LAYER, _NET_LAYERS_V1):
            continue
        known = True
        numbers = (_LAYER_NAME, _LAYER_BLOBS) if field == _NET_LAYER else (_V1_NAME, _V1_BLOBS)
        name, found = _read_layer(value, *numbers)
        for index, blob in enumerate(found):
            if f"{name}.{index}" in blobs:
                raise FormatError(f"two layers are called '{name[:60]}'")
            blobs[f"{name}.{index}"] = blob
    if not known:
        raise FormatError("it has no Caffe layers")
    return blobs


def _read_layer(layer, name_field: int, blob_field: int) -> Tuple[str, List[torch.Tensor]]:
    name, blobs = "", []
    for field, value in _fields(_message(layer)):
        if field == name_field:
            name = bytes(_message(value).data).decode("utf-8")
        elif field == blob_field:
            blobs.append(_read_blob(_message(value)))
    return name, blobs


def _read_blob(blob: Bytes) -> torch.Tensor:
    legacy, shape, chunks, kind = {}, None, [], "<f4"
    for field, value in _fields(blob):
        if field in _BLOB_LEGACY_SHAPE:
            legacy[field] = value
        elif field == _BLOB_SHAPE:
            shape = _read_shape(_message(value))
        elif field in (_BLOB_DATA, _BLOB_DOUBLE_DATA):
            kind = "<f4" if field == _BLOB_DATA else "<f8"
            chunks.append(value.data if isinstance(value, Bytes) else value)
    if len(chunks) == 1:
        values = chunks[0]
    else:  # numbers one by one, each with a tag of its own
        values = memoryview(bytearray().join(chunks))
    if shape is None:
        shape = _modern_shape([legacy.get(field, 0) for field in _BLOB_LEGACY_SHAPE])
    if any(not isinstance(n, int) for n in shape):
        raise FormatError("a blob has no proper shape")
    if element_count(shape) * int(kind[-1]) != len(values):
        raise FormatError(
            f"a blob of shape {tuple(shape)} has {len(values) // int(kind[-1])} values"
        )
    return as_tensor(values, kind, shape)


def _modern_shape(legacy: List[int]) -> List[int]:
    if legacy[:3] == [1, 1, 1]:
        return legacy[3:]
    return legacy[2:] if legacy[:2] == [1, 1] else legacy


def _read_shape(message: Bytes) -> List[int]:
    shape: List[int] = []
    for field, value in _fields(message):
        if field != _SHAPE_DIM:
            continue
        if isinstance(value, Bytes):  # packed
            while value.left():
                shape.append(_varint(value))
        else:
            shape.append(value)
    return shape


def _message(value) -> Bytes:
    if not isinstance(value, Bytes):
        raise FormatError("a field has an unexpected type")
    return value


def _fields(source: Bytes) -> Iterator[Tuple[int, Union[int, memoryview, Bytes]]]:
    """Fields of a message: varints as int, fixed-size numbers as bytes, the rest as Bytes."""
    while source.left():
        tag = _varint(source)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            yield field, _varint(source)
        elif wire == _FIXED64:
            yield field, source.take(8)
        elif wire == _FIXED32:
            yield field, source.take(4)
        elif wire == _LENGTH:
            yield field, Bytes(source.take(_varint(source)))
        else:
            raise FormatError("it is not a protocol buffer")


def _varint(source: Bytes) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = source.take(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise FormatError("it is not a protocol buffer")
