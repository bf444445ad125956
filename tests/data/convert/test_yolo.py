"""YOLO's polygons: folders, class names, turned pictures, mistakes by line."""

import pytest
from PIL import Image

from d2ext.data.convert.objects import to_coco_file
from d2ext.data.convert.yolo import read_yolo
from d2ext.errors import UserError

from tests.data.convert.helpers import CLASSES, FORMATS, photo


@pytest.fixture
def data_set(tmp_path):
    FORMATS["yolo"](tmp_path)
    return tmp_path


def read(folder, split="train"):
    return read_yolo(str(folder / "data.yaml"), split)


def yaml(folder, text):
    (folder / "data.yaml").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: [images/train]\nnames: [cell, leaf, stone]\nnc: 3\n",
        "train: ../images/train\nnames: {0: cell, 1: leaf, 2: stone}\n",  # Roboflow's
        "train: list.txt\nval: images/train\nnames: ['cell', 'leaf', 'stone']\n",
    ],
)
def test_images_are_found_as_data_yaml_says(data_set, text):
    expected = read(data_set)
    (data_set / "list.txt").write_text(
        "images/train/a.png\nimages/train/b.png\n\n./images/train/c.png"
    )
    yaml(data_set, text)
    found = read(data_set)
    assert found.classes == CLASSES
    root = str(data_set / "images/train")
    assert to_coco_file(found, root) == to_coco_file(expected, root)


def test_fractions_are_those_of_the_picture_shown(data_set):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo(3)).save(data_set / "images/train/d.jpg", exif=exif)
    line = "1 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.5"
    (data_set / "labels/train/d.txt").write_text(line)
    picture = next(p for p in read(data_set).pictures if p.path.endswith("d.jpg"))
    assert picture.size == (48, 64)  # the file has 64x48 pixels
    assert picture.shapes[0].polygons == [[12, 16, 36, 16, 36, 32, 12, 32]]


def test_images_without_label_file_are_background_and_told(data_set):
    (data_set / "labels/train/b.txt").unlink()
    found = read(data_set)
    assert found.notes == ["1 images have no label file and count as background"]
    assert [len(p.shapes) for p in sorted(found.pictures, key=lambda p: p.path)] == [3, 0, 0]
    for file in (data_set / "labels/train").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no image of 'train' has labels; the first .*a.txt"):
        read(data_set)


@pytest.mark.parametrize(
    "line, words",
    [
        ("0 0.1 0.1 0.5 0.5", "a box without polygon"),
        ("0 0.1 0.1 0.5 0.5 0.2", "at least 3 points"),
        ("0 0.1 0.1 0.5 x 0.2 0.2", "not a class number and fractions"),
        ("3 0.1 0.1 0.5 0.5 0.2 0.2", "class 3 is not among the 3"),
        ("0.5 0.1 0.1 0.5 0.5 0.2 0.2", "class 0.5 is not among"),
        ("nan 0.1 0.1 0.5 0.5 0.2 0.2", "class nan is not among"),
        ("0 0.1 0.1 0.5 0.5 0.2 12", "12 is no fraction"),
        ("0 0.1 0.1 0.5 0.5 0.2 nan", "nan is no fraction"),
    ],
)
def test_mistakes_are_named_by_line(data_set, line, words):
    file = data_set / "labels/train/a.txt"
    file.write_text(f"0 0.1 0.1 0.5 0.1 0.5 0.5\n\n{line}\n")
    with pytest.raises(UserError, match=f"a.txt line 3: .*{words}") as error:
        read(data_set)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: images/train\n", "has no 'names'"),
        ("train: images\nnames: {0: a, 2: b}", "not numbered 0, 1"),
        ("train: images\nnames: 3", "no list of class names"),
        ("train: images\nnames: [a]\nnc: 2", "nc is 2, but 1 names"),
        ("val: images\nnames: [a]", "has no 'train'; it has val"),
        ("train: gone\nnames: [a]", "gone does not exist"),
        ("a: 1\nnames: [a\n", "line 3: not valid YAML"),
    ],
)
def test_mistakes_of_data_yaml_are_named(data_set, text, words):
    yaml(data_set, text)
    with pytest.raises(UserError, match=f"data.yaml.*{words}"):
        read(data_set)
