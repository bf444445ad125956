"""MXNet's `.params` files against byte-exact samples."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from d2ext.checkpoint.formats import read_file
from d2ext.errors import UserError

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "fcis_vectors.json"
SAMPLE = next(
    v
    for v in json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]
    if v["id"] == "params_20_file_bytes"
)


def read(tmp_path, data):
    path = tmp_path / "net.params"
    path.write_bytes(data)
    return read_file(str(path))


@pytest.mark.parametrize("form", sorted(SAMPLE["inputs"]))
def test_every_form_of_the_samples_is_read(tmp_path, form):
    file = read(tmp_path, bytes.fromhex(SAMPLE["inputs"][form]))
    assert file.format == "mxnet" and list(file.weights) == list(SAMPLE["expected"])
    for name, expected in SAMPLE["expected"].items():
        assert list(file.weights[name].shape) == expected["shape"]
        assert file.weights[name].flatten().tolist() == expected["data"]


@pytest.mark.parametrize(
    "number, dtype", list(enumerate(["<f4", "<f8", "<f2", "|u1", "<i4", "|i1", "<i8"]))
)
def test_every_type_of_array_is_read(tmp_path, number, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    data = struct.pack("<3Q", 0x112, 0, 1)
    data += struct.pack("<IiI2q3i", 0xF993FAC9, 0, 2, 2, 3, 1, 0, number) + array.tobytes()
    data += struct.pack("<2Q", 1, 1) + b"a"
    found = read(tmp_path, data).weights["a"].numpy()
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, array)


def test_an_array_without_values_is_read(tmp_path):
    data = struct.pack("<3Q", 0x112, 0, 1) + struct.pack("<IiI", 0xF993FAC9, 0, 0)
    data += struct.pack("<2Q", 1, 1) + b"a"
    assert read(tmp_path, data).weights["a"].shape == (0,)


@pytest.mark.parametrize(
    "array, text",
    [
        (struct.pack("<Ii", 0xF993FAC9, 1), "sparse arrays are not supported"),
        (struct.pack("<I", 0xF993FACA), "arrays of MXNet 2 are not supported"),
        (struct.pack("<II", 40, 1), "an array with 40 dimensions"),
        (struct.pack("<II3i", 1, 1, 1, 0, 9), "an array of the unknown type 9"),
        (struct.pack("<II3i", 1, 1 << 31, 1, 0, 0), "the file is truncated"),
        (struct.pack("<IIq3i", 0xF993FAC8, 1, -5, 1, 0, 0), "is no shape of an array"),
    ],
)
def test_arrays_that_cannot_be_read_are_named(tmp_path, array, text):
    with pytest.raises(UserError, match=text):
        read(tmp_path, struct.pack("<3Q", 0x112, 0, 1) + array)


def test_huge_counts_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="should hold 4611686018427387904 items"):
        read(tmp_path, struct.pack("<3Q", 0x112, 0, 1 << 62) + b"\0" * 64)


def test_names_that_do_not_fit_the_arrays_are_named(tmp_path):
    data = struct.pack("<3Q", 0x112, 0, 0) + struct.pack("<2Q", 1, 1) + b"a"
    with pytest.raises(UserError, match="it has 0 arrays, but 1 names"):
        read(tmp_path, data)
