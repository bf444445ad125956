"""Files are there as a whole or not at all."""

import os

import pytest

from d2ext.data.json_files import writing
from d2ext.errors import UserError
from d2ext.inference.storage import list_folder, read_bytes, write_bytes


@pytest.fixture(params=["here", "remote"])
def folder(request, tmp_path):
    """A folder that does not exist, here or where fsspec writes."""
    if request.param == "here":
        return str(tmp_path / "out")
    pytest.importorskip("fsspec")
    return f"memory://{tmp_path.name}"


def test_what_was_written_is_read_back(folder):
    assert list_folder(folder) == []
    for content in (b"first", b"second one"):
        write_bytes(f"{folder}/a/b.bin", content)
        assert read_bytes(f"{folder}/a/b.bin") == content
    assert read_bytes(f"{folder}/a/b.bin", (7, 3)) == b"one"
    assert list_folder(f"{folder}/a") == ["b.bin"]
    with pytest.raises(UserError, match="ends too early: 3 of 30"):
        read_bytes(f"{folder}/a/b.bin", (7, 30))
    with pytest.raises(UserError, match="gone.bin cannot be read"):
        read_bytes(f"{folder}/gone.bin")


def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = str(tmp_path / "a.txt")
    with writing(path) as f:
        f.write("old")
    with pytest.raises(KeyboardInterrupt):
        with writing(path) as f:
            f.write("new")
            raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*a.bin"):
        write_bytes(str(tmp_path / "file/a.bin"), b"")


def test_addresses_of_an_unknown_kind_are_refused():
    with pytest.raises(UserError, match="nosuch://a/b"):
        read_bytes("nosuch://a/b")
