"""Caffe's HDF5 snapshots, against a file that h5py wrote the way Caffe does: a group "data", groups
per layer in it (empty ones for layers without weights), arrays "0" and "1" (h5py 3.16,
``File(path, "w", libver="earliest")``)."""

import gzip
from pathlib import Path

import pytest
import torch

from d2ext.checkpoint.formats import read_file
from d2ext.errors import UserError

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "caffe_snapshot.h5.gz"
SHAPES = {
    "conv1_1": (2, 3, 3, 3),
    "conv1_2": (2, 2, 3, 3),
    "rpn_conv_3x3": (3, 2, 1, 1),
    "fc6": (4, 5),
    "mask_pred": (6, 4),
    "bbox_pred": (8, 3),
}


@pytest.fixture
def content():
    return gzip.decompress(SAMPLE.read_bytes())


def read(tmp_path, data):
    path = tmp_path / "net.caffemodel.h5"
    path.write_bytes(bytes(data))
    return read_file(str(path))


def test_every_array_is_read_and_empty_groups_are_skipped(tmp_path, content):
    file = read(tmp_path, content)
    assert file.format == "hdf5" and len(file.weights) == 2 * len(SHAPES)
    for index, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        weight = torch.arange(float(count)).reshape(shape) + 100 * index
        assert file.weights[f"data/{name}/0"].equal(weight)
        assert file.weights[f"data/{name}/1"].equal(torch.full(shape[:1], -float(index)))


def test_a_truncated_file_is_named(tmp_path, content):
    with pytest.raises(UserError, match="the file is truncated"):
        read(tmp_path, content[:-100])


def test_the_newer_file_format_is_named_with_the_way_around(tmp_path, content):
    with pytest.raises(UserError, match="libver='earliest'"):
        read(tmp_path, content[:8] + b"\x03" + content[9:])


def test_a_group_that_contains_itself_is_refused(tmp_path, content):
    """The first entry of the first symbol table is made to lead back to the root group."""
    data = bytearray(content)
    root = data[64:72]
    entry = data.index(b"SNOD") + 8
    data[entry + 8 : entry + 16] = root
    with pytest.raises(UserError, match="one object has several names"):
        read(tmp_path, data)
