"""COCO files of CVAT and Roboflow."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.data.convert.coco_export import read_coco_export
from d2ext.data.convert.objects import to_coco_file
from d2ext.errors import UserError

from tests.data.convert.helpers import FORMATS, SIZE


@pytest.fixture
def export(tmp_path):
    """`export(change)`: the COCO file that a change of CVAT's gives, and its notes."""
    file = FORMATS["cvat"](tmp_path)[1]
    original = file.read_text()

    def run(change, **options):
        data = json.loads(original)
        change(data)
        file.write_text(json.dumps(data, indent=1))
        images = str(tmp_path / "images/default")
        found = read_coco_export(str(file), images, **options)
        return to_coco_file(found, images), found.notes

    return run


def test_a_root_class_goes_only_if_it_is_empty(export):
    def add(data, number, name="plant"):
        for category in data["categories"]:
            category["supercategory"] = "plant"
        data["categories"].append({"id": number, "name": name, "supercategory": "none"})

    names = [c["name"] for c in export(lambda d: add(d, 0))[0]["categories"]]
    assert names == ["cell", "leaf", "stone"]
    assert len(export(lambda d: add(d, 7))[0]["categories"]) == 4
    assert len(export(lambda d: add(d, 0, "moss"))[0]["categories"]) == 4

    def add_of_one_name(data):
        add(data, 0, "leaf")
        data["categories"][0]["supercategory"] = "leaf"

    assert export(add_of_one_name)[0] == export(lambda d: None)[0]
    with pytest.raises(UserError, match="the class 'leaf' is listed twice"):
        export(lambda d: add(d, 7, "leaf"))

    def use(data):
        add(data, 0)
        data["annotations"][0]["category_id"] = 0

    data = export(use)[0]
    assert [c["name"] for c in data["categories"]] == ["plant", "cell", "leaf", "stone"]
    assert [a["category_id"] for a in data["annotations"]] == [1, 4, 3, 2]


def test_what_cvat_painted_is_an_object(export):
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[10:20, 30:45] = 1
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=2, append=2)))
    painted = {"size": list(mask.shape), "counts": runs.tolist()}

    def paint(data):
        data["annotations"][0].update(segmentation=painted, iscrowd=1)

    data, notes = export(paint, crowds_are_objects=True)
    first = data["annotations"][0]
    assert (first["iscrowd"], first["area"], first["bbox"]) == (0, 150, [30, 10, 15, 10])
    np.testing.assert_array_equal(mask_util.decode(first["segmentation"]), mask)
    assert notes == ["1 masks marked as crowds are taken as objects: --keep-crowds"]
    data, notes = export(paint)
    assert data["annotations"][0]["iscrowd"] == 1 and notes == []


def test_compressed_masks_come_back(export):
    mask = np.zeros(SIZE[::-1], np.uint8, order="F")
    mask[3:9, 2:5] = 1
    rle = mask_util.encode(mask)
    rle["counts"] = rle["counts"].decode()
    data, _ = export(lambda d: d["annotations"][0].update(segmentation=rle))
    assert data["annotations"][0]["segmentation"]["counts"] == rle["counts"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"segmentation": []}, "has a box only"),
        ({"segmentation": [[1, 2, 3, 4]]}, "at least 3 points"),
        ({"segmentation": {"size": [3, 3], "counts": [9]}}, "not of the size of the picture"),
        ({"segmentation": {"size": [48, 64], "counts": [9]}}, "cannot be decoded"),
        ({"segmentation": {"size": [48, 64], "counts": [-1, 3073]}}, "cannot be decoded"),
        ({"segmentation": {"size": [48, 64], "counts": None}}, "cannot be decoded"),
        ({"image_id": 77}, "unknown image_id 77"),
        ({"image_id": [1]}, "unknown image_id"),
        ({"category_id": 77}, "unknown category_id 77"),
    ],
)
def test_mistakes_are_named_by_line(export, tmp_path, change, words):
    with pytest.raises(UserError) as error:
        export(lambda d: d["annotations"][1].update(change))
    text = (tmp_path / "annotations/instances_default.json").read_text()
    line = text[: text.index('"id": 5,')].count("\n")
    assert f"instances_default.json line {line}: " in str(error.value), str(error.value)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_and_repeated_images_are_named_by_line(export):
    with pytest.raises(UserError, match=r"line \d+: image .*gone.png does not exist; name its"):
        export(lambda d: d["images"][1].update(file_name="gone.png"))
    with pytest.raises(UserError, match=r"line \d+: the id 20 is none, or that of another"):
        export(lambda d: d["images"][1].update(id=20))
    with pytest.raises(UserError, match="is 64x48, but 48x64 in the annotations"):
        export(lambda d: d["images"][1].update(width=48, height=64))
    with pytest.raises(UserError, match="a.png is annotated twice; remove one"):
        export(lambda d: d["images"][1].update(file_name="a.png"))
