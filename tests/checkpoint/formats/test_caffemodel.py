"""Caffe's binary files against ones that the protobuf package wrote."""

import numpy as np
import pytest
import torch

from d2ext.checkpoint.formats import read_file
from d2ext.errors import UserError

from tests.checkpoint.formats.helpers import caffe_messages


def read(tmp_path, message):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(message if isinstance(message, bytes) else message.SerializeToString())
    return read_file(str(path)).weights


def values(*shape):
    return torch.arange(float(np.prod(shape))).reshape(shape)


def test_layers_of_both_generations_are_read(tmp_path):
    caffe = caffe_messages()
    for field, kind in (("layer", "Convolution"), ("layers", 4)):
        net = caffe["NetParameter"](name="net")
        layer = getattr(net, field).add(name="conv1_1", type=kind)
        for shape in ((2, 3, 2, 2), (2,)):
            blob = layer.blobs.add(data=values(*shape).flatten().tolist())
            blob.shape.dim.extend(shape)
        getattr(net, field).add(name="relu1_1")
        found = read(tmp_path, net)
        assert list(found) == ["conv1_1.0", "conv1_1.1"]
        assert found["conv1_1.0"].equal(values(2, 3, 2, 2))
        assert found["conv1_1.1"].equal(values(2))


def test_four_dimensional_blobs_of_old_files_get_their_present_shapes(tmp_path):
    caffe = caffe_messages()
    net = caffe["NetParameter"]()
    shapes = {"fc6": (1, 1, 4, 6), "bias": (1, 1, 1, 4), "conv": (4, 2, 1, 1), "one": (1, 1, 1, 1)}
    for name, (num, channels, height, width) in shapes.items():
        net.layers.add(name=name).blobs.add(
            data=values(num * channels * height * width).tolist(),
            num=num,
            channels=channels,
            height=height,
            width=width,
        )
    found = {name: tuple(x.shape) for name, x in read(tmp_path, net).items()}
    assert found == {"fc6.0": (4, 6), "bias.0": (4,), "conv.0": (4, 2, 1, 1), "one.0": (1,)}


def test_gradients_are_skipped_and_doubles_read(tmp_path):
    caffe = caffe_messages()
    net = caffe["NetParameter"]()
    blob = net.layer.add(name="a").blobs.add(data=[1, 2], diff=[3, 4])
    blob.shape.dim.append(2)
    blob = net.layer.add(name="b").blobs.add(double_data=[0.1, 0.2])
    blob.shape.dim.append(2)
    found = read(tmp_path, net)
    assert found["a.0"].tolist() == [1, 2] and found["a.0"].dtype == torch.float32
    assert found["b.0"].tolist() == [0.1, 0.2] and found["b.0"].dtype == torch.float64


def test_numbers_that_are_not_packed_are_read(tmp_path):
    """Field 5, wire type 5, one number each; and a shape of single numbers."""
    data = b"".join(b"\x2d" + np.float32(x).tobytes() for x in (1.5, -2.0))
    blob = b"\x3a\x02\x08\x02" + data
    layer = b"\x0a\x01a" + b"\x3a" + bytes([len(blob)]) + blob
    assert read(tmp_path, b"\xa2\x06" + bytes([len(layer)]) + layer)["a.0"].tolist() == [1.5, -2.0]


def test_wrong_sizes_and_names_are_named(tmp_path):
    caffe = caffe_messages()
    net = caffe["NetParameter"]()
    net.layer.add(name="a").blobs.add(data=[1, 2, 3]).shape.dim.extend([2, 2])
    with pytest.raises(UserError, match=r"an array of shape \(2, 2\) has 3 values"):
        read(tmp_path, net)
    net = caffe["NetParameter"]()
    for _ in range(2):
        net.layer.add(name="a").blobs.add(data=[1]).shape.dim.append(1)
    with pytest.raises(UserError, match="two layers are called 'a'"):
        read(tmp_path, net)
    with pytest.raises(UserError, match="it has no Caffe layers"):
        read(tmp_path, caffe["NetParameter"](name="empty"))
    with pytest.raises(UserError, match="not a protocol buffer"):
        read(tmp_path, b"\xff" * 40)
