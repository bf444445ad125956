"""Folders as data sets: what `--data` stands for."""

import json

import pytest

from d2ext.data.folder import find_data
from d2ext.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """`folder(parts, info)`: a folder `my data` with these files, beside a folder of images."""
    (tmp_path / "photos").mkdir()

    def make(*parts, info=None):
        made = tmp_path / "my data"
        made.mkdir()
        for part in parts:
            (made / f"{part}.json").write_text(json.dumps({"images": [], "info": info}))
        return made

    return make


def test_parts_are_the_files_that_are_there(folder):
    made = folder("train", "test", info={"image_folder": "../photos"})
    names, texts = find_data(str(made))
    assert names == {"train": "my_data_train", "test": "my_data_test"}
    photos = made.parent / "photos"
    assert texts == [f"my_data_{part}={made}/{part}.json,{photos}" for part in ("train", "test")]


@pytest.mark.parametrize("info", [None, {}, {"image_folder": 3}, "text"])
def test_images_are_named_or_in_the_folder(folder, info):
    made = folder("train", info=info)
    assert find_data(str(made))[1] == [f"my_data_train={made}/train.json,{made}"]
    (made / "images").mkdir()
    assert find_data(str(made))[1] == [f"my_data_train={made}/train.json,{made}/images"]
    photos = str(made.parent / "photos")
    assert find_data(str(made), photos)[1] == [f"my_data_train={made}/train.json,{photos}"]


def test_moved_images_are_one_line(folder):
    made = folder("train", info={"image_folder": "../elsewhere"})
    with pytest.raises(UserError, match="image folder .*nowhere does not exist; name it: --images"):
        find_data(str(made), "nowhere")
    # What the file says is only a hint: the images may have moved into the folder.
    assert find_data(str(made))[1] == [f"my_data_train={made}/train.json,{made}"]


def test_registered_sets_are_found_by_what_they_have_in_common():
    assert find_data("shapes") == (
        {"train": "shapes_train", "val": "shapes_val"},
        [],
    )
    assert find_data("shapes_val") == ({"train": "shapes_val"}, [])


def test_what_is_neither_is_one_line(folder, tmp_path):
    made = folder()
    with pytest.raises(UserError, match="has no train.json, val.json or test.json; make them"):
        find_data(str(made))
    with pytest.raises(UserError, match="neither a folder nor a registered data set"):
        find_data("nothing")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="is a file; split it first"):
        find_data(str(tmp_path / "a.json"))
