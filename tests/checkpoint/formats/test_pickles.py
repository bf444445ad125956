"""Pickles of arrays, read without running anything in them."""

import collections
import copy
import mmap
import pickle
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch

from d2ext.checkpoint.formats import FormatError, read_file
from d2ext.checkpoint.formats.pickles import Opaque, read_pickle
from d2ext.errors import UserError

PROTOCOLS = pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))


def load(data):
    mapped = mmap.mmap(-1, len(data))
    mapped[:] = data
    return read_pickle("memory", mapped)


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
        return open, (self.path, "w")


@PROTOCOLS
def test_nothing_in_a_pickle_runs(tmp_path, protocol):
    data = pickle.dumps([Trap(tmp_path / "made"), 5], protocol=protocol)
    found = load(data)
    assert isinstance(found[0], Opaque) and found[1] == 5
    assert repr(found[0]).endswith("io.open, not loaded>")
    assert not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").exists()  # the trap works


@PROTOCOLS
def test_objects_with_items_and_attributes_are_inert(protocol):
    value = [collections.defaultdict(list, {"a": [1]}), collections.deque([1, 2]), ValueError("x")]
    value += [torch.device("cpu"), torch.Size([2])]
    found = load(pickle.dumps(value, protocol=protocol))
    assert all(isinstance(x, Opaque) for x in found) and len(copy.deepcopy(found)) == 5


def test_a_pickle_changes_nothing_for_the_next_one():
    """BUILD sets attributes: of the function that makes a dict, its default arguments."""
    function = b"ccollections\nOrderedDict\n"
    state = b"N}X\x0c\0\0\0__defaults__]K\x01K\x02\x86a\x85s\x86"
    with pytest.raises(FormatError, match="it changes something that is no object"):
        load(b"\x80\x02" + function + state + b"b.")
    assert load(b"\x80\x02" + function + b")R.") == {}


HUGE = (1 << 62).to_bytes(8, "little")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04\x8e" + HUGE + b"abc.",
        b"\x80\x04\x8d" + HUGE + b"abc.",
        b"\x80\x05\x96" + HUGE + b"abc.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + HUGE + b"\x85R.",
        b"\x80\x02cbuiltins\nbytes\n\x8a\x08" + HUGE + b"\x85R.",
        b"\x80\x02cnumpy\nndarray\n\x8a\x08" + HUGE + b"\x85R.",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.",
    ],
)
def test_pickles_that_ask_for_much_memory_are_refused(program):
    with pytest.raises(FormatError):
        load(program)


def test_sparse_numbers_in_the_memo_cost_nothing():
    """The standard library's reader in C makes room for all before."""
    assert load(b"\x80\x02Nr\xff\xff\xff\x7f.") is None


def test_copying_the_same_values_again_and_again_is_refused():
    copies = b"\x80\x02cbuiltins\nset\nq\x00]q\x01(" + b"K\x01" * 5000 + b"e"
    copies += b"h\x00h\x01\x85R0" * 5000 + b"N."
    with pytest.raises(FormatError, match="again and again"):
        load(copies)
    state = b"\x80\x02}q\x01(" + b"".join(
        b"J" + i.to_bytes(4, "little") + b"N" for i in range(5000)
    )
    state += b"uccollections\nOrderedDict\n)R" + b"h\x01b" * 5000 + b"."
    with pytest.raises(FormatError, match="again and again"):
        load(state)


def doubled(levels):
    """A tuple that holds the one before twice, level upon level; from memo number 0."""
    return b")q\x00" + b"h\x00\x86q\x00" * levels


NESTED = {
    # 129 bytes for a key of 2**60 parts; the others have 2**40.
    "shortest": b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "key": b"\x80\x02}" + doubled(40) + b"K\x01s.",
    "set": b"\x80\x04\x8f(" + doubled(40) + b"\x90.",
    "frozenset": b"\x80\x04(" + doubled(40) + b"\x91.",
    "items": b"\x80\x02}(" + doubled(40) + b"K\x01u.",
    "dict": b"\x80\x02(" + doubled(40) + b"K\x01d.",
    "called set": b"\x80\x02c__builtin__\nset\n]" + doubled(40) + b"a\x85R.",
    "called dict": b"\x80\x02ccollections\nOrderedDict\n]" + doubled(40) + b"N\x86a\x85R.",
    "counter": b"\x80\x02ccollections\nCounter\n]" + doubled(40) + b"a\x85R.",
    "moved name": b"\x80\x02cUserDict\nOrderedDict\n]" + doubled(40) + b"N\x86a\x85R.",
    "type of an array": b"\x80\x02cnumpy\ndtype\n" + doubled(40) + b"\x85R.",
    "array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85RK\x00"
    + doubled(40)
    + b"s.",
    "deep": b"\x80\x02})" + b"\x85" * (2 << 20) + b"K\x01s.",
}


def test_nested_keys_neither_hang_nor_crash(tmp_path):
    """In a process of its own: the standard library and torch hang or crash on nearly all."""
    assert len(NESTED["shortest"]) == 129
    for name, program in NESTED.items():
        (tmp_path / f"{name}.pkl").write_bytes(program)
        if name != "deep":  # seconds, and nothing else than in a pickle
            with zipfile.ZipFile(tmp_path / f"{name}.pth", "w") as archive:
                archive.writestr("x/data.pkl", program)
                archive.writestr("x/version", "3")
    code = """
        import pathlib, resource, sys
        from d2ext.checkpoint.formats import UserError, read_file
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        for path in pathlib.Path(sys.argv[1]).iterdir():
            try:
                print(path.name, "|", read_file(str(path)))
            except UserError as error:
                print(path.name, "|", error)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(" | ") for line in run.stdout.splitlines())
    assert set(lines) == {path.name for path in tmp_path.iterdir()}
    for name, line in lines.items():
        assert line.startswith("checkpoint '") and len(line) < 400
        if not name.startswith(("array", "type of an array")):
            assert line.endswith("a key of a dict or a member of a set is no text and no number")


def test_nested_values_that_are_no_keys_are_read_and_not_printed(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}X\x05\0\0\0model" + doubled(40) + b"s.")
    with pytest.raises(UserError, match="'model' is a tuple$"):
        read_file(str(path))
    path.write_bytes(b"\x80\x02}(X\x05\0\0\0model}X\x01\0\0\0a" + doubled(40) + b"u.")
    assert read_file(str(path)).weights == {}


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
