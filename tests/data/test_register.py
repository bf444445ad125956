"""Registration of COCO-format data sets: spec text, checks with one-line errors, class order."""

import copy
import json

import pytest
from PIL import Image

from d2ext.data import parse_register, register_coco_dataset
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

VALID = {
    "images": [{"id": 4, "file_name": "a.png", "width": 8, "height": 6}],
    "annotations": [
        {
            "id": 9,
            "image_id": 4,
            "category_id": 7,
            "bbox": [1, 1, 3, 3],
            "segmentation": [[1, 1, 4, 1, 4, 4]],
            "iscrowd": 0,
            "area": 4.5,
        }
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "semantic").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images/a.png")
    Image.new("L", (8, 6)).save(tmp_path / "semantic/a.png")
    return tmp_path


def _write(folder, data, name="annotations.json"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_spec_is_parsed():
    assert parse_register("mine=a b.json, images") == ("mine", "a b.json", "images", None)
    assert parse_register("mine=x=1.json,images,maps") == ("mine", "x=1.json", "images", "maps")


@pytest.mark.parametrize(
    "text", ["", "mine", "mine=", "mine=a.json", "=a,b", "m=a,b,c,d", "m=a,,c"]
)
def test_bad_spec_is_quoted_with_the_right_form(text):
    with pytest.raises(UserError, match=r"write NAME=annotations.json,image_dir\[,semantic_dir\]"):
        parse_register(text)


def test_registered_set_has_classes_by_ascending_id_and_loads(folder):
    json_file = _write(folder, VALID)
    register_coco_dataset("mine", json_file, str(folder / "images"), str(folder / "semantic"))
    assert MetadataCatalog.get("mine").thing_classes == ["dog", "cat"]
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(folder / "images/a.png")
    assert record["sem_seg_file_name"] == str(folder / "semantic/a.png")
    assert record["annotations"][0]["category_id"] == 1
    assert record["annotations"][0]["id"] == 9
    assert MetadataCatalog.get("mine").thing_classes == ["dog", "cat"]


def test_semantic_maps_are_optional(folder):
    register_coco_dataset("mine", _write(folder, VALID), str(folder / "images"))
    assert "sem_seg_file_name" not in DatasetCatalog.get("mine")[0]


def test_same_paths_again_are_accepted_and_others_rejected(folder, monkeypatch):
    json_file, images = _write(folder, VALID), str(folder / "images")
    register_coco_dataset("mine", json_file, images)
    monkeypatch.chdir(folder)
    register_coco_dataset("mine", "annotations.json", "images")
    with pytest.raises(UserError, match="'mine' is already taken by .*annotations.json"):
        register_coco_dataset("mine", _write(folder, VALID, "other.json"), images)
    with pytest.raises(UserError, match="already taken"):
        register_coco_dataset("mine", json_file, images, str(folder / "semantic"))
    with pytest.raises(UserError, match="'coco_2017_val' is already taken"):
        register_coco_dataset("coco_2017_val", json_file, images)


def _changed(**changes):
    """VALID with entries replaced: section=list, or section__key=value in its first entry."""
    data = copy.deepcopy(VALID)
    for key, value in changes.items():
        section, _, entry = key.partition("__")
        if entry:
            data[section][0][entry] = value
        else:
            data[section] = value
    return data


def _without(section, key):
    data = copy.deepcopy(VALID)
    del data[section][0][key]
    return data


TWO_CATS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
TWO_ONES = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]


@pytest.mark.parametrize(
    "data, match",
    [
        ('{"images": [}', "is not valid JSON: Expecting value at line 1 column 13"),
        ('{\n "a": 1\n "b": 2}', "at line 3 column 2"),
        ("[1]", "its top level is no object"),
        ({"images": [], "annotations": []}, "has no list 'categories'"),
        (_changed(categories=[]), "has no categories"),
        (_changed(images=[]), "has no images"),
        (_changed(categories=TWO_CATS), "categories has name 'cat' twice"),
        (_changed(categories=TWO_ONES), "categories has id 1 twice"),
        (_changed(images=VALID["images"] * 2), "image a.png has the id 4 of another image"),
        (
            _changed(annotations=VALID["annotations"] * 2),
            "annotation 9 has the id of another annotation",
        ),
        (_changed(annotations__image_id=5), "annotation 9 has unknown image_id 5"),
        (_changed(annotations__category_id=1), "annotation 9 has unknown category_id 1"),
        (_changed(annotations__bbox=[1, 2]), "annotation 9 has a bbox that is not"),
        (_changed(annotations__ignore=1), "annotation 9 has 'ignore'"),
        (_changed(images__file_name="b.png"), "image .*b.png, the first of .* does not exist"),
        (_without("annotations", "segmentation"), r"annotations\[0\] has no 'segmentation'"),
        (_without("images", "width"), r"images\[0\] has no 'width'"),
        (_without("categories", "name"), r"categories\[0\] has no 'name'"),
    ],
)
def test_faulty_annotation_file_is_reported_in_one_line(folder, data, match):
    json_file = _write(folder, data)
    with pytest.raises(UserError, match=match) as info:
        register_coco_dataset("mine", json_file, str(folder / "images"))
    assert json_file in str(info.value) and "\n" not in str(info.value)
    assert "mine" not in DatasetCatalog.list()


def test_missing_paths_are_named(folder):
    json_file, images = _write(folder, VALID), str(folder / "images")
    with pytest.raises(UserError, match="annotation file .*no.json does not exist"):
        register_coco_dataset("mine", str(folder / "no.json"), images)
    with pytest.raises(UserError, match="image folder .*nowhere does not exist"):
        register_coco_dataset("mine", json_file, str(folder / "nowhere"))
    with pytest.raises(UserError, match="semantic map folder .*nowhere does not exist"):
        register_coco_dataset("mine", json_file, images, str(folder / "nowhere"))
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.json is not UTF-8"):
        register_coco_dataset("mine", str(folder / "binary.json"), images)


def test_file_deleted_after_registration_is_named(folder):
    json_file = _write(folder, VALID)
    register_coco_dataset("mine", json_file, str(folder / "images"))
    (folder / "annotations.json").unlink()
    with pytest.raises(UserError, match="data set 'mine': .*annotations.json does not exist"):
        DatasetCatalog.get("mine")
