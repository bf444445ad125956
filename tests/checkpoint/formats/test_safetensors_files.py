"""Files of safetensors, in both directions."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from d2ext.checkpoint import read_metadata
from d2ext.checkpoint.convert import save_weights
from d2ext.checkpoint.formats import read_file
from d2ext.errors import UserError


def test_weights_and_metadata_come_back(tmp_path):
    path = str(tmp_path / "x.safetensors")
    weights = {
        "b": torch.randn(2, 3, 4).permute(2, 0, 1),
        "a": torch.arange(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    weights["shared"] = weights["b"][0]
    metadata = {"thing_classes": ["a", "ö"], "settings": {"pixel_std": [1.0, 0.1, 58.395]}}
    save_weights(path, weights, metadata)
    file = read_file(path)
    assert file.format == "safetensors" and set(file.weights) == set(weights)
    for name, value in weights.items():
        single = value.float() if value.is_floating_point() else value
        assert file.weights[name].dtype == single.dtype and file.weights[name].equal(single), name
    assert read_metadata(path) == metadata and file.rest["metadata"] == metadata


def test_the_library_reads_what_is_written(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_weights(path, {"a": torch.arange(3.0)}, {"thing_classes": ["a"]})
    assert safetensors.torch.load_file(path)["a"].tolist() == [0, 1, 2]
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["metadata"]) == {"thing_classes": ["a"]}


def test_files_of_other_programs_are_read(tmp_path):
    """Their header has no metadata, or some that is no JSON."""
    path = str(tmp_path / "weights")  # the format is told from the content
    for length in (0, 40, 100, 500):  # of the header: its first byte may be that of a pickle
        for header in (None, {"metadata": "x" * length}, {"format": "pt"}):
            safetensors.torch.save_file({"a": torch.ones(2)}, path, header)
            file = read_file(path)
            assert file.weights["a"].tolist() == [1, 1] and file.rest == (header or {})


def test_the_file_does_not_change_when_a_loaded_tensor_does(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    read_file(str(path)).weights["a"].zero_()
    assert path.read_bytes() == before


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    good = path.read_bytes()
    for data in (good[:-4], good.replace(b'"F32"', b'"F64"'), good[:8] + b"{" * (len(good) - 8)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read: ") as error:
            read_file(str(path))
        assert "\n" not in str(error.value)
