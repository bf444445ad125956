"""Instance masks in PNG files."""

import numpy as np
import pytest
from PIL import Image

from d2ext.data.convert.masks import read_masks
from d2ext.data.convert.objects import to_coco_file
from d2ext.data.voc_sds import CLASSES as VOC_CLASSES
from d2ext.errors import UserError

from tests.data.convert.helpers import FORMATS, photo, write_photos


@pytest.fixture
def folders(tmp_path):
    """Folders of images and, empty, of masks."""
    (tmp_path / "masks").mkdir()
    return str(write_photos(tmp_path / "images")), tmp_path / "masks"


def save(path, values, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype)).save(path)


def numbered():
    values = np.zeros((48, 64), int)
    values[4:9, 5:12], values[20:30, 20:40] = 300, 7
    return values


def test_numbers_beyond_255_are_objects_in_ascending_order(folders):
    images, masks = folders
    save(masks / "a.png", numbered(), np.uint16)
    found = read_masks(str(masks), images, class_name="cell")
    data = to_coco_file(found, images)
    assert [i["file_name"] for i in data["images"]] == ["a.png"]
    assert found.notes == ["2 images have no mask and are left out"]
    assert [a["bbox"] for a in data["annotations"]] == [[20, 20, 20, 10], [5, 4, 7, 5]]
    assert [a["area"] for a in data["annotations"]] == [200, 35]


def test_classes_without_names_are_those_of_voc(tmp_path):
    folder = FORMATS["voc"](tmp_path)[1]
    maps = str(tmp_path / "SegmentationClass")
    found = read_masks(str(folder), str(tmp_path / "JPEGImages"), maps)
    assert found.classes == list(VOC_CLASSES)
    names = [s.name for p in found.pictures for s in p.shapes]
    assert names == ["bicycle", "bird", "bicycle", "aeroplane"]


@pytest.mark.parametrize("form", ["a/{}.png", "a/masks/{}.png", "a_{}.png"])
def test_one_file_per_object_is_found_by_its_name(folders, form):
    images, masks = folders
    Image.fromarray(photo(5)).save(f"{images}/a_1.png")  # the longer name counts
    for name, left in (("leaf_10", 30), ("stone_2", 10)):
        values = np.zeros((48, 64))
        values[5:15, left : left + 5] = 255
        save(masks / form.format(name), values)
    save(masks / form.format("leaf_3").replace("a", "a_1", 1), np.eye(48, 64))
    data = to_coco_file(read_masks(str(masks), images), images)
    assert [i["file_name"] for i in data["images"]] == ["a.png", "a_1.png"]
    found = [(a["image_id"], a["category_id"], a["bbox"][0]) for a in data["annotations"]]
    assert found == [(1, 2, 10), (1, 1, 30), (2, 1, 0)]


def test_masks_are_those_of_the_picture_shown(folders):
    images, masks = folders
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo(5)).save(f"{images}/d.jpg", exif=exif)
    save(masks / "d.png", numbered())
    with pytest.raises(UserError, match="d.png is 64x48, its picture 48x64 as its EXIF"):
        read_masks(str(masks), images, class_name="cell")
    save(masks / "d.png", numbered().T)
    (picture,) = read_masks(str(masks), images, class_name="cell").pictures
    assert picture.size == (48, 64)


def test_mistakes_are_named_by_file(folders, tmp_path):
    images, masks = folders

    def refused(words, *arguments, **options):
        with pytest.raises(UserError, match=words) as error:
            read_masks(str(masks), images, *arguments, **options)
        assert "\n" not in str(error.value)

    refused("has no PNG file named like an image of")
    save(masks / "a.png", numbered())
    refused("says no class; give --class-maps or --class-name")
    refused("a.png cannot be read: No such file", str(tmp_path / "gone"))
    save(tmp_path / "classes/a.png", numbered() > 7)
    refused(r"a.png object 7: has the labels \[0\] in .*a.png", str(tmp_path / "classes"))
    save(masks / "a.png", np.zeros((9, 9)))
    refused("a.png is 9x9, its picture 64x48", class_name="cell")
    save(masks / "a.png", np.zeros((48, 64, 3)))
    refused("a.png has mode RGB", class_name="cell")
    (masks / "a.png").write_bytes(b"x")
    refused("a.png cannot be read", class_name="cell")
    (masks / "a.png").unlink()
    save(masks / "a/1.png", numbered())
    refused("1.png has no class in its name; name the class")
