"""What a user sees without the extra "importers"."""

import sys

import pytest
import torch

from d2ext.checkpoint.convert import save_weights
from d2ext.checkpoint.formats import caffemodel, read_file
from d2ext.errors import UserError

MISSING = "this needs {}; pip install 'd2ext[importers]'"


def hide(monkeypatch, module):
    for name in [x for x in sys.modules if x.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("net.caffemodel", "google.protobuf", "protobuf"),
        ("net.caffemodel.h5", "h5py", "h5py"),
        ("net.safetensors", "safetensors", "safetensors"),
    ],
)
def test_a_file_without_its_library_is_named_with_the_extra(
    tmp_path, samples, monkeypatch, name, module, package
):
    path = tmp_path / name
    path.write_bytes(samples[name])
    hide(monkeypatch, module)
    caffemodel._net_class.cache_clear()
    with pytest.raises(UserError) as error:
        read_file(str(path))
    assert str(error.value) == f"checkpoint '{path}' cannot be read: {MISSING.format(package)}"


def test_writing_without_the_library_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    hide(monkeypatch, "safetensors")
    with pytest.raises(UserError) as error:
        save_weights(str(path), {"a": torch.ones(1)}, {})
    assert str(error.value) == f"cannot write '{path}': {MISSING.format('safetensors')}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "zoo.pkl", "net.params"])
def test_the_other_formats_need_none(tmp_path, samples, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(samples[name])
    for module in ("google.protobuf", "h5py", "safetensors"):
        hide(monkeypatch, module)
    assert read_file(str(path)).weights
