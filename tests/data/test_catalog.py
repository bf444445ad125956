"""What is asked of registered data sets."""

import os

import pytest

from d2ext.data import dataset_classes, shapes
from d2ext.data.catalog import describe_records, is_registered_as, semantic_map_path
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def register():
    """Function that registers a name with class names and more metadata."""

    def add(name, classes, **more):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(thing_classes=classes, **more)

    return add


def test_classes_of_several_sets_must_agree(register, shapes_few):
    register("mine", ["dog", "cat"])
    register("renamed", ["dog", "lion"])
    register("short", ["dog"])
    register("empty", [])
    assert dataset_classes([shapes_few]) == list(shapes.THING_CLASSES)
    assert dataset_classes("mine") == dataset_classes(["mine", "mine"]) == ["dog", "cat"]
    with pytest.raises(UserError, match="'mine' and 'renamed' .*class 1 is 'cat' and 'lion'"):
        dataset_classes(["mine", "renamed"])
    with pytest.raises(UserError, match="2 and 1 classes"):
        dataset_classes(["mine", "short"])
    with pytest.raises(UserError, match="'empty' has no class names"):
        dataset_classes("empty")
    with pytest.raises(UserError, match="unknown data set 'mina'; did you mean mine"):
        dataset_classes("mina")
    with pytest.raises(UserError, match="no data set given"):
        dataset_classes([])


def test_a_name_stands_for_its_paths_however_they_are_written(register, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register("mine", ["dog"], json_file="a.json", image_root=str(tmp_path / "images"))
    assert is_registered_as("mine", os.path.abspath("a.json"), "images")
    assert not is_registered_as("mine", "a.json", "pictures")
    assert not is_registered_as("mine", "a.json", "images", "maps")
    assert not is_registered_as("other", "a.json", "images")


def test_maps_are_named_by_the_stem_of_the_image():
    assert semantic_map_path("maps", "images/sub/a.b.jpg") == os.path.join("maps", "a.b.png")


def test_records_are_described_by_images_and_instances_of_the_largest_classes():
    objects = [{"category_id": 1}] * 3 + [{"category_id": 0}, {"category_id": 1, "iscrowd": 1}]
    records = [{"annotations": objects}, {"annotations": []}, {}]
    text = describe_records(records, ["cat", "dog", "owl"])
    assert text == "3 images, 4 instances (dog 3, cat 1, none of owl)"
    assert describe_records(records[1:], ["cat"]) == "2 images, 0 instances"
    many = [{"annotations": [{"category_id": c} for c in range(10) for _ in range(c + 1)]}]
    assert describe_records(many).endswith("class 2 3, 3 of others)")
