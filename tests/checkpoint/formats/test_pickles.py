"""Pickles of arrays, read by an interpreter that cannot run anything."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch

from d2ext.checkpoint.formats import read_file
from d2ext.checkpoint.formats.common import FormatError
from d2ext.checkpoint.formats.pickles import Opaque, load_pickle
from d2ext.errors import UserError

PROTOCOLS = pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))


def load(data):
    return load_pickle(memoryview(data))


@PROTOCOLS
def test_plain_values_come_back(protocol):
    value = {
        "numbers": [0, 1, 255, 256, 70000, -3, 2**40, -(2**80), 1.5, True, False, None],
        "texts": ("", "a", "ä\n", "x" * 300, b"", b"bytes", b"y" * 300),
        "nested": [[], {}, (), ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))],
        "sets": [{1, 2}],
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        3: "key",
    }
    value["twice"] = value["nested"]
    found = load(pickle.dumps(value, protocol=protocol))
    assert found == value and list(found["ordered"]) == ["b", "a"]
    assert found["twice"] is found["nested"]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i8", "<i4", "|i1", "|u1", "|b1"])
def test_arrays_come_back(protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    value = {"c": array, "fortran": np.asfortranarray(array), "none": array[:0]}
    value["twice"] = value["c"]
    found = load(pickle.dumps(value, protocol=protocol))
    for name in value:
        assert found[name].shape == value[name].shape
        np.testing.assert_array_equal(found[name], value[name])
    scalar = load(pickle.dumps({"a": np.float32(1.5), "b": np.int64(3)}, protocol=protocol))
    assert scalar == {"a": 1.5, "b": 3}


# What Python 2 wrote for {"a": np.array([1.5, -2.0], "f4")} with protocol 2.
PYTHON_2 = (
    b"\x80\x02}q\x01U\x01aq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04"
    b"K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f4K\x00K\x01\x87Rq\x07"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\xc0?\x00\x00\x00"
    b"\xc0tbs."
)


def test_arrays_that_python_2_wrote_come_back():
    assert pickle.loads(PYTHON_2, encoding="latin1")["a"].tolist() == [1.5, -2.0]
    assert load(PYTHON_2)["a"].tolist() == [1.5, -2.0]


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@PROTOCOLS
def test_nothing_in_a_pickle_runs(tmp_path, protocol):
    data = pickle.dumps([Trap(tmp_path / "made"), 5], protocol=protocol)
    found = load(data)
    assert isinstance(found[0], Opaque) and found[1] == 5
    assert not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").exists()  # the trap works


def test_pickles_that_would_exhaust_memory_are_refused():
    """Each makes the standard library's reader allocate gigabytes or more."""
    huge = (1 << 62).to_bytes(8, "little")
    programs = {
        b"\x80\x04\x8e" + huge + b"abc.": "",
        b"\x80\x04\x8d" + huge + b"abc.": "",
        b"\x80\x04\x96" + huge + b"abc.": "",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + huge + b"\x85R.": "",
        b"\x80\x02}q\x01" + b"ccollections\nOrderedDict\nq\x02": "",
    }
    for program in programs:
        with pytest.raises((ValueError, TypeError, LookupError)):
            load(program)
    # Sparse numbers in the memo cost nothing here.
    assert load(b"\x80\x02Nr\xff\xff\xff\x7f.") is None
    copies = b"\x80\x02cbuiltins\nset\nq\x00]q\x01(" + b"K\x01" * 500 + b"e"
    copies += b"h\x00h\x01\x85R0" * 500 + b"N."
    with pytest.raises(FormatError, match="again and again"):
        load(copies)


def test_deep_nesting_ends_in_one_line(tmp_path):
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    with pytest.raises(UserError, match="not of the form"):
        read_file(str(path))


def test_the_zoo_of_detectron2_and_caffe2_is_understood(tmp_path):
    array = np.ones((2, 3), np.float32)
    files = {
        "zoo": {"model": {"a": array}, "__author__": "zoo", "matching_heuristics": True},
        "caffe2": {"blobs": {"a": array, "a_momentum": array}, "cfg": "text"},
        "image_net": {"a": array, "a_momentum": array},
    }
    rests = {}
    for name, content in files.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
        file = read_file(str(tmp_path / f"{name}.pkl"))
        assert list(file.weights) == ["a"] and file.weights["a"].equal(torch.ones(2, 3))
        rests[name] = file.rest
    assert rests["zoo"] == {"__author__": "zoo", "matching_heuristics": True}
    converted = {"__author__": "Caffe2", "matching_heuristics": True}
    assert rests["caffe2"] == {"cfg": "text", **converted}
    assert rests["image_net"] == converted
