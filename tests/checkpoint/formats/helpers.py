"""Small files of every format, written by somebody else's code where there is any."""

import collections
import struct

import numpy as np
import torch


class Config:
    """An object that only the program which wrote the file knows."""

    def __init__(self):
        self.depth = 50


def caffe_messages():
    """The classes of Caffe's protocol buffers that hold weights, made by the protobuf package."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe")

    def message(title, /, **fields):
        added = file.message_type.add(name=title)
        for field, (number, of, repeated) in fields.items():
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            new = added.field.add(name=field, number=number, label=label)
            if isinstance(of, str):
                new.type, new.type_name = kind.TYPE_MESSAGE, f".caffe.{of}"
            else:
                new.type = of
                if repeated and of in (kind.TYPE_FLOAT, kind.TYPE_DOUBLE, kind.TYPE_INT64):
                    new.options.packed = True

    floats, doubles = (kind.TYPE_FLOAT, True), (kind.TYPE_DOUBLE, True)
    integer, text = (kind.TYPE_INT32, False), (kind.TYPE_STRING, False)
    message("BlobShape", dim=(1, kind.TYPE_INT64, True))
    message(
        "BlobProto",
        shape=(7, "BlobShape", False),
        data=(5, *floats),
        diff=(6, *floats),
        double_data=(8, *doubles),
        num=(1, *integer),
        channels=(2, *integer),
        height=(3, *integer),
        width=(4, *integer),
    )
    message("LayerParameter", name=(1, *text), type=(2, *text), blobs=(7, "BlobProto", True))
    message("V1LayerParameter", name=(4, *text), type=(5, *integer), blobs=(6, "BlobProto", True))
    message(
        "NetParameter",
        name=(1, *text),
        layers=(2, "V1LayerParameter", True),
        layer=(100, "LayerParameter", True),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))
        for name in ("NetParameter", "LayerParameter", "V1LayerParameter", "BlobProto")
    }


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv1.weight": rng.standard_normal((2, 3, 2, 2)).astype(np.float32),
        "conv1.bias": np.arange(2, dtype=np.float32),
        "steps": np.asarray(7, np.int64),
    }


def tensors():
    return collections.OrderedDict((k, torch.from_numpy(v.copy())) for k, v in arrays().items())


def mxnet_bytes(named):
    """A `.params` file in its second form."""
    out = [struct.pack("<3Q", 0x112, 0, len(named))]
    kinds = {np.float32: 0, np.float64: 1, np.float16: 2, np.uint8: 3, np.int32: 4, np.int64: 6}
    for value in named.values():
        out.append(struct.pack("<IiI", 0xF993FAC9, 0, value.ndim))
        out.append(struct.pack(f"<{value.ndim}q", *value.shape))
        out.append(struct.pack("<3i", 2, 0, kinds[value.dtype.type]) + value.tobytes())
    out.append(struct.pack("<Q", len(named)))
    out += [struct.pack("<Q", len(k)) + k.encode() for k in named]
    return b"".join(out)
