"""Caffe's HDF5 snapshots, against a file that h5py wrote the way Caffe does: a group "data", groups
per layer in it (empty ones for layers without weights), arrays "0" and "1" (h5py 3.16,
`File(path, "w", libver="earliest")`)."""

import gzip
from pathlib import Path

import h5py
import numpy as np
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


def test_arrays_that_are_not_compressed_stay_in_the_file(tmp_path):
    """Their tensors are one mapping, in which they lie as far apart as in the file."""
    path = tmp_path / "net.h5"
    values = {name: np.arange(6, dtype="<f4") + i for i, name in enumerate("ab")}
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value
        file.flush()
        offsets = {name: file[name].id.get_offset() for name in values}
    found = read_file(str(path)).weights
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in values.items()}
    distance = found["b"].data_ptr() - found["a"].data_ptr()
    assert distance == offsets["b"] - offsets["a"]
    before = path.read_bytes()
    found["a"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4", "<i4", "|u1"])
def test_other_features_of_hdf5_are_read(tmp_path, libver, dtype):
    values = np.arange(600).reshape(20, 30).astype(dtype)
    with h5py.File(tmp_path / "net.h5", "w", libver=libver) as file:
        file.create_dataset("data/a/0", data=values, compression="gzip", chunks=(7, 8))
        file["data/a/1"] = values[0]
        file["data/a/2"] = values[0, 3]
    found = read_file(str(tmp_path / "net.h5")).weights
    for name, value in {"0": values, "1": values[0], "2": values[0, 3]}.items():
        np.testing.assert_array_equal(found[f"data/a/{name}"].numpy(), value)


def test_a_truncated_file_is_named(tmp_path, content):
    with pytest.raises(UserError, match="cannot be read: .*truncated file"):
        read(tmp_path, content[:-100])


def test_a_group_that_contains_itself_is_refused(tmp_path, content):
    """The first entry of the first symbol table is made to lead back to the root group."""
    data = bytearray(content)
    root = data[64:72]
    entry = data.index(b"SNOD") + 8
    data[entry + 8 : entry + 16] = root
    with pytest.raises(UserError, match="one object has several names"):
        read(tmp_path, data)


def test_values_from_elsewhere_and_other_types_are_refused(tmp_path):
    """A link or an array may name another file of the machine."""
    path = tmp_path / "net.h5"
    (tmp_path / "secret").write_bytes(bytes(64))
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", (4,))
    external = [(str(tmp_path / "secret"), 0, 16)]
    for make, text in (
        (lambda f: f.__setitem__("a", h5py.ExternalLink("other.h5", "/a")), "a link to elsewhere"),
        (lambda f: f.__setitem__("a", h5py.SoftLink("/b")), "a link to elsewhere"),
        (lambda f: f.create_dataset("a", (4,), "f4", external=external), "are not in the file"),
        (lambda f: f.create_virtual_dataset("a", layout), "are not in the file"),
        (lambda f: f.create_dataset("a", (1 << 40,), "f4"), "are not in the file"),
        (lambda f: f.create_dataset("a", data="text"), "no array of numbers"),
    ):
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(UserError, match=text):
            read_file(str(path))


def test_an_array_that_would_unfold_into_much_memory_is_refused(tmp_path):
    with h5py.File(tmp_path / "net.h5", "w") as file:
        array = file.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 10,), compression="gzip")
        array[:3] = 1
    with pytest.raises(UserError, match="would unfold into 4398046511104 bytes"):
        read_file(str(tmp_path / "net.h5"))
