"""Both kinds of files of torch.save, read without executing anything in them."""

import collections
import io
import os
import zipfile

import numpy as np
import pytest
import torch

from d2ext.checkpoint.formats import read_file
from d2ext.errors import UserError

KINDS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Trap:
    """Unpickling this the ordinary way creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


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
    ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"],
)
def test_tensors_of_every_type_come_back(tmp_path, zipped, dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    found = save({"a": tensor, "b": tensor > 3}, tmp_path / "x.pth", zipped).weights
    assert found["a"].dtype == tensor.dtype and found["a"].equal(tensor)
    assert found["b"].equal(tensor > 3)


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
    content = {"meta": {"trap": Trap(tmp_path / "made"), "keep": 3}, "state_dict": state}
    file = save(content, tmp_path / "x.pth", zipped)
    assert not (tmp_path / "made").exists()
    assert file.weights["a"].equal(state["a"])
    assert repr(file.rest["meta"]["trap"]) == "<posix.mkdir, not loaded>"
    assert file.rest["meta"]["keep"] == 3


@KINDS
def test_an_object_among_the_weights_is_named(tmp_path, zipped):
    torch.save(
        {"a": Trap(tmp_path / "made")}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped
    )
    assert message(tmp_path / "x.pth").endswith("'a' is a posix.mkdir")
    assert not (tmp_path / "made").exists()


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
    """torch itself trusts the pickle and would read beyond the end."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4)}, path)
    rewrite(path, **{"data/0": b"\0" * 8})
    assert "an array of shape (4,) needs 16 bytes, the file has 8" in message(path)
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
    assert "a tensor reaches beyond its storage" in message(path)


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
    rewrite(tmp_path / "x.pth", byteorder=b"big")
    assert "big-endian" in message(tmp_path / "x.pth")


def test_a_storage_of_an_unknown_type_is_named(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pth")
    assert "unknown type 'ComplexFloatStorage'" in message(tmp_path / "x.pth")


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
