"""labelme's files: groups, all kinds of shapes, pictures that are turned, mistakes by line."""

import base64
import io
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2ext.data.convert.labelme import read_labelme
from d2ext.data.convert.objects import to_coco_file
from d2ext.errors import UserError

from tests.data.convert.helpers import drawn, photo

TRIANGLE = [[2, 2], [20, 2], [20, 14]]


def shape(points=TRIANGLE, label="leaf", kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, **more}


def write(folder, *shapes, name="a.png", orientation=None, **more):
    """One image of 64x48 as shown, and its file, indented by one blank."""
    exif = Image.Exif()
    size = (64, 48)
    if orientation:
        exif[274] = orientation
        size = size if orientation < 5 else size[::-1]
    Image.fromarray(photo(0, size)).save(folder / name, exif=exif)
    data = {"imagePath": name, "imageHeight": 48, "imageWidth": 64, "shapes": list(shapes), **more}
    (folder / name).with_suffix(".json").write_text(json.dumps(data, indent=1))


def convert(folder, **options):
    return to_coco_file(read_labelme(str(folder)), str(folder), **options)


def masks(data):
    return [mask_util.decode(a["segmentation"]) for a in data["annotations"]]


def test_shapes_of_one_group_and_label_are_one_object(tmp_path):
    other = [[30, 20], [40, 20], [40, 30]]
    shapes = [shape(group_id=1), shape(other, group_id=1), shape(other, "cell", group_id=1)]
    write(tmp_path, *shapes, shape(group_id=2), shape(other, group_id=None))
    data = convert(tmp_path)
    assert [c["name"] for c in data["categories"]] == ["cell", "leaf"]
    assert [a["category_id"] for a in data["annotations"]] == [2, 1, 2, 2]
    first = data["annotations"][0]
    assert first["segmentation"] == [sum(TRIANGLE, []), sum(other, [])]
    both = drawn(sum(TRIANGLE, [])) | drawn(sum(other, []))
    assert first["area"] == both.sum() and first["bbox"] == [2, 2, 38, 28]
    (mask, *_) = masks(convert(tmp_path, segmentation="rle"))
    np.testing.assert_array_equal(mask, both)


def test_rectangles_circles_and_masks_become_areas(tmp_path):
    part = np.zeros((5, 7), np.uint8)
    part[1:4, 2:6] = 255
    png = io.BytesIO()
    Image.fromarray(part).save(png, "png")
    mask = base64.b64encode(png.getvalue()).decode()
    write(
        tmp_path,
        shape([[4, 6], [14, 10]], kind="rectangle"),
        shape([[30, 20], [40, 20]], kind="circle"),
        shape([[50, 30], [56, 34]], kind="mask", mask=mask),
    )
    rectangle, circle, painted = masks(convert(tmp_path, segmentation="rle"))
    assert rectangle.sum() == rectangle[6:10, 4:14].sum() == 40
    rows, columns = np.indices((48, 64)) + 0.5
    inside = np.hypot(columns - 30, rows - 20)
    assert circle[inside < 9.3].all() and not circle[inside > 10.7].any()
    assert abs(circle.sum() - 100 * math.pi) < 10
    expected = np.zeros((48, 64))
    expected[30:35, 50:57] = part > 0
    np.testing.assert_array_equal(painted, expected)
    assert convert(tmp_path)["annotations"][2]["bbox"] == [52, 31, 4, 3]


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_coordinates_are_those_of_the_picture_shown(tmp_path, orientation):
    """As labelme shows it; the file has 64x48 or 48x64 pixels."""
    write(tmp_path, shape(), name="a.jpg", orientation=orientation)
    data = convert(tmp_path)
    assert (data["images"][0]["width"], data["images"][0]["height"]) == (64, 48)
    assert data["annotations"][0]["segmentation"] == [sum(TRIANGLE, [])]


def test_annotations_of_the_picture_as_stored_are_refused(tmp_path):
    write(tmp_path, shape(), name="a.jpg", orientation=6, imageWidth=48, imageHeight=64)
    with pytest.raises(UserError, match="a.json: image .*a.jpg is 64x48, but 48x64 .* EXIF"):
        convert(tmp_path)


def test_images_elsewhere_are_found_by_name(tmp_path):
    write(tmp_path, shape())
    (tmp_path / "labels").mkdir()
    data = json.loads((tmp_path / "a.json").read_text()) | {"imagePath": "..\\photos\\a.png"}
    (tmp_path / "labels/a.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="photos/a.png does not exist; put it there"):
        read_labelme(str(tmp_path / "labels"))
    found = read_labelme(str(tmp_path / "labels"), str(tmp_path))
    assert to_coco_file(found, str(tmp_path))["images"][0]["file_name"] == "a.png"


def test_other_json_files_and_empty_objects_are_told(tmp_path):
    write(tmp_path, shape(), shape([[9, 9], [9.1, 9], [9.1, 9.1]]))
    (tmp_path / "other.json").write_text("[]")
    found = read_labelme(str(tmp_path))
    assert len(to_coco_file(found, str(tmp_path))["annotations"]) == 1
    assert found.notes[0].startswith("1 JSON files are not of labelme")
    assert found.notes[1].endswith("a.json line 24: covers no pixel and is left out")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (shape([[1, 1], [9, 9]], kind="line"), "'line' covers no area"),
        (shape([[1, 1], [9, 9]]), "needs at least 3 points"),
        (shape([1, 1, 9, 9, 9, 1]), "not pairs of x and y"),
        (shape([[1, 1], [2, 2], [3, 3]], kind="rectangle"), "not 2 pairs"),
        (shape([[1, 1], [2, 2], [3, float("nan")]]), "nan is no finite number"),
        (shape([[1, 1], [2, "2"], [3, 3]]), "'2' is no finite number"),
        (shape([[1, 1], [2, 2], [1e6, 3]]), "1000000.0 lies far outside"),
        (shape([[1, 1], [1e300, 1]], kind="circle"), "1e\\+300 lies far outside"),
        (shape([[1, 1], [9, 9]], kind="mask", mask="AAAA"), "its mask cannot be read"),
        (shape([[1, 1], [9, 9]], kind="mask"), "its mask cannot be read"),
        (shape(label=""), "without label"),
    ],
)
def test_mistakes_are_named_by_line(tmp_path, wrong, words):
    write(tmp_path, shape(), wrong)
    text = (tmp_path / "a.json").read_text()
    # The second shape follows the end of the first one.
    line = text[: text.index("  }", text.index("shapes"))].count("\n") + 2
    with pytest.raises(UserError, match=f"a.json line {line}: .*{words}") as error:
        convert(tmp_path)
    assert "\n" not in str(error.value)


def test_files_that_are_not_read_are_named(tmp_path):
    with pytest.raises(UserError, match="has no JSON file of labelme"):
        read_labelme(str(tmp_path))
    write(tmp_path)
    (tmp_path / "a.json").write_text('{"shapes": [\n1,\n}')
    with pytest.raises(UserError, match="a.json line 3: not valid JSON"):
        read_labelme(str(tmp_path))
    write(tmp_path, imagePath=None)
    with pytest.raises(UserError, match="has no 'imagePath'"):
        read_labelme(str(tmp_path))
    write(tmp_path, None)
    with pytest.raises(UserError, match=r"a.json: shapes\[0\]: a shape without label"):
        read_labelme(str(tmp_path))
    write(tmp_path)
    with pytest.raises(UserError, match="no class is known; name the classes"):
        convert(tmp_path)
