"""Data at an address: what is fetched, when again, and what becomes of the copy."""

import multiprocessing
import shutil
from pathlib import Path

import fsspec
import pytest

from d2ext.data import get_dataset_records, register_coco_dataset
from d2ext.data.folder import find_data
from d2ext.data.remote import local_path
from d2ext.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket():
    """A storage in memory, whose files have no path of this machine."""
    storage = fsspec.filesystem("memory")
    storage.pipe({"/bucket/a/one.txt": b"1", "/bucket/a/deep/two.txt": b"22"})
    yield storage
    storage.rm("/bucket", recursive=True)


def files_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_copied_once_and_then_follows_its_changes(bucket, monkeypatch):
    folder = Path(local_path("memory://bucket/a"))
    assert files_below(folder) == {"one.txt": b"1", "deep/two.txt": b"22"}
    fetched = []
    real = type(bucket).get
    monkeypatch.setattr(
        type(bucket), "get", lambda self, *a, **k: (fetched.extend(a[0]), real(self, *a, **k))[1]
    )
    assert Path(local_path("memory://bucket/a")) == folder and not fetched
    bucket.rm("/bucket/a/one.txt")
    bucket.pipe({"/bucket/a/deep/two.txt": b"33", "/bucket/a/new.txt": b"4"})
    local_path("memory://bucket/a")
    assert files_below(folder) == {"new.txt": b"4", "deep/two.txt": b"33"}
    assert sorted(fetched) == ["/bucket/a/deep/two.txt", "/bucket/a/new.txt"]


def test_a_file_that_was_removed_from_the_copy_is_fetched_again(bucket):
    folder = Path(local_path("memory://bucket/a"))
    (folder / "one.txt").unlink()
    local_path("memory://bucket/a")
    assert (folder / "one.txt").read_bytes() == b"1"


def test_a_single_file_keeps_its_name(bucket):
    path = Path(local_path("memory://bucket/a/one.txt"))
    assert path.name == "one.txt" and path.read_bytes() == b"1"


def test_paths_of_this_machine_stay(tmp_path):
    assert local_path(str(tmp_path)) == str(tmp_path) and local_path("a.json") == "a.json"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memory://nowhere/data", "there is no such file or folder"),
        ("unheard://bucket/data", "unheard://bucket/data cannot be reached: Protocol not known"),
    ],
)
def test_addresses_without_data_are_refused_in_a_line(address, says):
    with pytest.raises(UserError, match=says) as caught:
        local_path(address)
    assert "\n" not in str(caught.value)


def test_what_was_fetched_before_an_interruption_is_not_fetched_again(bucket, monkeypatch):
    bucket.pipe({f"/bucket/b/{i:03}.txt": b"x" for i in range(150)})
    real, counts = type(bucket).get, []

    def get(self, files, targets):
        counts.append(len(files))
        if len(counts) == 2:
            raise OSError("the line is dead")
        return real(self, files, targets)

    monkeypatch.setattr(type(bucket), "get", get)
    with pytest.raises(UserError, match="cannot read memory://bucket/b: the line is dead"):
        local_path("memory://bucket/b")
    folder = Path(local_path("memory://bucket/b"))
    assert len(files_below(folder)) == 150 and counts == [64, 64, 64, 22]


def _fetch(address, queue):
    queue.put(local_path(address))


def test_processes_that_ask_at_once_get_the_same_whole_copy(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(100):
        (source / f"{number}.txt").write_text("x" * number)
    context, address = multiprocessing.get_context("spawn"), f"file://{source}"
    queue = context.Queue()
    processes = [context.Process(target=_fetch, args=(address, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    (folder,) = found
    assert files_below(Path(folder)) == files_below(source)


def test_a_data_set_can_be_at_an_address(shapes_root, tmp_path):
    split = Path(shapes_root) / "shapes/train"
    data = tmp_path / "mydata"
    shutil.copytree(split / "images", data / "images")
    shutil.copy(split / "annotations.json", data / "train.json")
    names, texts = find_data(f"file://{data}")
    assert names == {"train": "mydata_train"} and str(tmp_path / "cache") in texts[0]
    register_coco_dataset("far", f"file://{data}/train.json", f"file://{data}/images")
    for record in get_dataset_records("far"):
        assert Path(record["file_name"]).is_file()
        assert Path(record["file_name"]).is_relative_to(tmp_path / "cache")
