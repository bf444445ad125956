"""A file whose bytes have changed is refused, or has the weights that it had."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from d2ext.checkpoint import Checkpointer, read_file
from d2ext.checkpoint.convert import save_weights
from d2ext.checkpoint.formats.integrity import UNSEALED
from d2ext.errors import UserError
from d2ext.utils.testing import damaged_copies

COPIES = 120


def written(folder, kind) -> tuple[Path, dict[str, torch.Tensor]]:
    """A small file of one of the kinds that are written here, or by torch; its weights.

    Two layers have equal shapes: their parts can be taken for each other.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(20, 30), nn.Linear(30, 7))
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    path = folder / ("weights.pth" if kind in ("training", "torch") else f"weights.{kind}")
    if kind == "training":
        Checkpointer(model, str(folder), metadata={"thing_classes": ["a"]}).save("weights")
    elif kind == "torch":
        torch.save({"model": weights}, path)
    else:
        save_weights(str(path), weights, {"thing_classes": ["a"]})
    return path, weights


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["training", "pkl", "safetensors", "torch"])
def test_no_damaged_file_loads_other_weights(tmp_path, kind):
    path, weights = written(tmp_path, kind)
    assert same(read_file(str(path)).weights, weights)
    refused = 0
    for what, content in damaged_copies(path.read_bytes(), COPIES, seed=len(kind)):
        path.write_bytes(content)
        try:
            found = read_file(str(path)).weights
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert same(found, weights), what
    # Bytes between the parts of an archive mean nothing; most damage is to weights.
    assert refused > 0.9 * COPIES


@pytest.mark.parametrize("place", range(len(UNSEALED)))
def test_no_bit_of_a_checksum_can_change(tmp_path, place):
    path, _ = written(tmp_path, "training")
    content = bytearray(path.read_bytes())
    content[place - len(UNSEALED)] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pth' cannot be read: its checksum is wrong"):
        read_file(str(path))


def test_a_flipped_bit_of_weights_is_told_by_the_checksum_of_its_part(tmp_path):
    path, _ = written(tmp_path, "torch")
    content = bytearray(path.read_bytes())
    content[content.index(b"weights/data/0") + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="the checksum of its part '.*' is wrong"):
        read_file(str(path))
    assert read_file(str(path), check=False).weights  # torch does not see it


@pytest.mark.parametrize("kind", ["training", "pkl", "safetensors"])
def test_files_with_a_checksum_are_read_by_other_programs(tmp_path, kind):
    path, weights = written(tmp_path, kind)
    if kind == "training":
        assert zipfile.ZipFile(path).testzip() is None
        for mmap in (False, True):
            assert same(torch.load(path, mmap=mmap, weights_only=True)["model"], weights)
    elif kind == "pkl":
        content = pickle.loads(path.read_bytes())["model"]
        assert same({key: torch.from_numpy(value) for key, value in content.items()}, weights)
    else:
        library = pytest.importorskip("safetensors.torch")
        assert same(library.load_file(path), weights)


@pytest.mark.parametrize("kind", ["training", "pkl"])
def test_what_follows_a_checksum_or_is_missing_of_it_is_told(tmp_path, kind):
    path, _ = written(tmp_path, kind)
    content = path.read_bytes()
    for changed in (content[:-3], content + b"\0\0"):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="its last bytes are missing, or others follow them"):
            read_file(str(path))


def test_parts_of_an_archive_that_overlap_cost_no_time(tmp_path):
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/data/0", bytes(100_000))
        part = archive.filelist[-1]
        archive.filelist += [part] * 5000
    with pytest.raises(UserError, match="the parts of the archive are larger than the file"):
        read_file(str(path))


def test_older_files_of_model_zoos_are_compared_with_their_names(tmp_path):
    content = {"state_dict": {"a": torch.arange(1000.0)}}
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "net.pth").read_bytes()
    path = tmp_path / f"net_20200317-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    path.write_bytes(data)
    assert same(read_file(str(path)).weights, content["state_dict"])
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(UserError, match="is not the file whose checksum begins with"):
        read_file(str(path))
