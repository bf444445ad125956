"""Both kinds of files of torch.save, read without executing anything in them."""

import argparse
import collections
import copy
import copyreg
import io
import os
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from d2ext.checkpoint.formats import read_file
from d2ext.checkpoint.formats.pickles import Opaque
from d2ext.errors import UserError

KINDS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Trap:
    """Unpickling this the ordinary way creates a file."""

    def __init__(self, path, function=open):
        self.function, self.arguments = function, (str(path), "w")[: 1 + (function is open)]

    def __reduce__(self):
        return self.function, self.arguments


class ConfigDict(dict):
    """As MMDetection's: a dict that is its own state."""

    def __reduce__(self):
        return type(self).__new__, (type(self),), self, None, iter(self.items())

    def __reduce_ex__(self, protocol):
        return copyreg.__newobj__, (type(self),), self, None, iter(self.items())


class Buffer:
    """As MMDetection's history of a loss."""

    def __init__(self):
        self.values, self.items = np.arange(3.0), [1, 2]


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return read_file(str(path))


def message(path):
    with pytest.raises(UserError) as error:
        read_file(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@KINDS
@pytest.mark.parametrize(
    "dtype",
    [
        *("float32", "float64", "float16", "bfloat16", "complex64"),
        *("int64", "int32", "int16", "int8", "uint8"),
    ],
)
def test_tensors_of_every_type_come_back(tmp_path, zipped, dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    found = save({"a": tensor, "b": tensor.abs() > 3}, tmp_path / "x.pth", zipped).weights
    assert found["a"].dtype == tensor.dtype and found["a"].equal(tensor)
    assert found["b"].equal(tensor.abs() > 3)


@KINDS
def test_views_scalars_empty_and_shared_tensors_come_back(tmp_path, zipped):
    base = torch.randn(6, 4)
    values = {
        "base": base,
        "transposed": base.t(),
        "part": base[2:4, 1:],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "expanded": torch.ones(1).expand(5, 2),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    found = save(values, tmp_path / "x.pth", zipped).weights
    assert list(found) == list(values)
    for name, value in values.items():
        assert found[name].shape == value.shape and found[name].equal(value.detach()), name


@KINDS
def test_state_dicts_of_every_program_are_found(tmp_path, zipped):
    state = torch.nn.BatchNorm2d(3).state_dict()
    ours = save({"model": state, "iteration": 4, "metadata": {"a": ["b"]}}, tmp_path / "a", zipped)
    assert ours.rest == {"iteration": 4, "metadata": {"a": ["b"]}}
    mmdet = save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "b", zipped)
    assert mmdet.rest == {"meta": {"epoch": 12}}
    pycls = save({"epoch": 3, "model_state": state}, tmp_path / "d.pyth", zipped)
    assert pycls.rest["epoch"] == 3 and pycls.rest["matching_heuristics"] is True
    plain = save(state, tmp_path / "c", zipped)
    assert plain.rest == {}
    for file in (ours, mmdet, plain, pycls):
        assert list(file.weights) == list(state)
        assert all(file.weights[k].equal(state[k]) for k in state)


@KINDS
def test_objects_of_other_programs_are_skipped_and_never_run(tmp_path, zipped):
    state = {"a": torch.ones(2)}
    meta = {
        "trap": Trap(tmp_path / "made"),
        "keep": 3,
        "config": ConfigDict(type="HTC", depth=50),
        "history": {"loss": Buffer()},
        "counts": collections.defaultdict(int, {"a": 1}),
        "last": collections.deque([1, 2]),
        "arguments": argparse.Namespace(depth=50),
        "score": np.float64(0.5),
        "array": np.arange(6).reshape(2, 3),
        "path": tmp_path,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "type": torch.float16,
    }
    file = save({"meta": meta, "state_dict": state}, tmp_path / "x.pth", zipped)
    assert not (tmp_path / "made").exists()
    assert file.weights["a"].equal(state["a"])
    found = file.rest["meta"]
    assert repr(found["trap"]).endswith("io.open, not loaded>")
    assert repr(found["history"]["loss"]).endswith("Buffer, not loaded>")
    assert isinstance(found["arguments"], Opaque) and isinstance(found["path"], Opaque)
    assert (found["keep"], found["score"], found["size"]) == (3, 0.5, (2, 3))
    assert found["config"] == {"type": "HTC", "depth": 50} and found["counts"] == {"a": 1}
    assert list(found) == list(meta)
    again = copy.deepcopy(found)  # as for a training state
    assert again["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert again["trap"] is found["trap"] and again["config"] == found["config"]


def test_what_the_user_allows_torch_to_run_is_not_run_here_and_stays_allowed(tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([open])
    try:
        save({"trap": Trap(tmp_path / "made"), "model": {}}, tmp_path / "x.pth")
        assert not (tmp_path / "made").exists()
        assert open in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@KINDS
def test_an_object_among_the_weights_is_named(tmp_path, zipped):
    for trap, text in (
        (Trap(tmp_path / "made"), "'a' is a .*io.open$"),
        (Trap(tmp_path / "made", os.mkdir), "posix.mkdir"),  # torch refuses the module
    ):
        torch.save({"a": trap}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        assert re.search(text, message(tmp_path / "x.pth"))
        assert not (tmp_path / "made").exists()


def test_attributes_do_not_replace_the_methods_of_a_dict(tmp_path):
    value = collections.OrderedDict()
    value.get = 3
    torch.save({"meta": value, "state_dict": {}}, tmp_path / "x.pth")
    assert re.search("it changes .*methods", message(tmp_path / "x.pth"))


def test_entries_do_not_replace_the_methods_of_a_dict(tmp_path):
    meta = {"first": ConfigDict(get=1, type=2), "second": ConfigDict(keys=3)}
    found = save({"meta": meta, "state_dict": {}}, tmp_path / "x.pth").rest["meta"]
    assert found == meta and found["first"].get("type") == 2 and list(found["second"].keys())


def test_a_training_state_comes_back_whole(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    counts = collections.Counter({8: 1})
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": counts}
    rest = save(content, tmp_path / "x.pth").rest
    expected = torch.load(tmp_path / "x.pth", weights_only=True)
    torch.testing.assert_close(rest["optimizer"], expected["optimizer"], rtol=0, atol=0)
    assert rest["steps"] == counts


def test_the_file_does_not_change_when_a_loaded_tensor_does(tmp_path):
    path = tmp_path / "x.pth"
    file = save({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    file.weights["a"].zero_()
    del file
    assert path.read_bytes() == before


def rewrite(path, **changes):
    """Replace members of a torch archive."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            data = changes.get(name.split("/", 1)[1], data)
            if data is not None:
                archive.writestr(name, data)


def test_a_storage_of_another_size_than_its_pickle_says_is_named(tmp_path):
    """torch itself trusts the pickle and would read on in what follows."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)}, path)
    rewrite(path, **{"data/0": b"\0" * 8})
    assert "storage '0' has 8 bytes instead of 16" in message(path)
    rewrite(path, **{"data/0": None})
    assert "storage '0' is missing" in message(path)


def test_a_tensor_beyond_its_storage_is_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)[1:]}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        program = archive.read(name)
    assert program.count(b"K\x03\x85") == 1  # the size (3,)
    rewrite(path, **{"data.pkl": program.replace(b"K\x03\x85", b"K\x04\x85")})
    assert "Trying to resize storage" in message(path)


def test_a_tensor_beyond_its_storage_in_a_legacy_file_is_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)[1:]}, path, _use_new_zipfile_serialization=False)
    program = path.read_bytes()
    assert program.count(b"K\x03\x85") == 1
    path.write_bytes(program.replace(b"K\x03\x85", b"K\x04\x85"))
    assert "storage has wrong byte size" in message(path)


def test_archives_that_are_no_checkpoint_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "it has no data.pkl" in message(tmp_path / "other.pth")
    script = torch.jit.script(torch.nn.ReLU())
    script.save(str(tmp_path / "script.pth"))
    assert "TorchScript program" in message(tmp_path / "script.pth")
    torch.save({"a": torch.ones(4)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert "is compressed" in message(tmp_path / "packed.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        archive.writestr("X/data.pkl", b"")
    with zipfile.ZipFile(tmp_path / "twice.pth", "w") as archive:
        archive.writestr("x/data.pkl", content["x/data.pkl"])
        archive.writestr("x/DATA.pkl", content["x/data.pkl"])
    assert "two files of one name" in message(tmp_path / "twice.pth")


def test_files_of_machines_with_the_other_byte_order_are_read(tmp_path):
    path = tmp_path / "x.pth"
    values = torch.arange(4.0)
    torch.save({"a": values}, path)
    rewrite(path, byteorder=b"big", **{"data/0": values.numpy().astype(">f4").tobytes()})
    before = path.read_bytes()
    assert read_file(str(path)).weights["a"].equal(values)
    assert path.read_bytes() == before


def test_what_torch_is_not_asked_to_make_is_named(tmp_path):
    values = {
        "float8": (
            torch.ones(2).to(torch.float8_e4m3fn),
            "a storage of the unknown type 'storage.Untyped'",
        ),
        "sparse": (
            torch.eye(2).to_sparse(),
            "torch.serialization._get_layout, which is not supported",
        ),
        "bytes": (bytearray(b"abc"), "builtins.bytearray, which is not supported"),
    }
    for name, (value, text) in values.items():
        torch.save({"a": value}, tmp_path / f"{name}.pth")
        assert text in message(tmp_path / f"{name}.pth")


def test_archives_of_the_first_versions_of_torch_are_refused(tmp_path):
    """A tar archive whose first name is the beginning of a legacy file."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("0123456789abcdef"), None)
    data = bytearray(data.getvalue())
    legacy = io.BytesIO()
    torch.save({}, legacy, _use_new_zipfile_serialization=False)
    data[:14] = legacy.getvalue()[:14]
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "x.pth").write_bytes(data)
    assert "it is a tar archive" in message(tmp_path / "x.pth")


def test_legacy_files_of_cuda_tensors_load_on_the_cpu(tmp_path):
    """The place of a storage is a text in the pickle, which does not matter here."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3)}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    (tmp_path / "x.pth").write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\0\0\0cuda:0"))
    assert read_file(str(tmp_path / "x.pth")).weights["a"].tolist() == [0, 1, 2]


def test_numpy_arrays_in_torch_files_are_weights_too(tmp_path):
    found = save({"a": np.arange(6.0).reshape(2, 3)}, tmp_path / "x.pth").weights["a"]
    assert found.dtype == torch.float64 and found.tolist() == [[0, 1, 2], [3, 4, 5]]
