"""Mistakes of whole annotation files: errors that name the likely cause; none in sound files."""

import copy
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.data.check.coco_file import entry_problems
from d2ext.errors import UserError

WIDTH, HEIGHT = 90, 50


def sound_data(images=12):
    """Files of 90x50 with three quadrilaterals and an RLE mask each."""
    rng = np.random.default_rng(0)
    data = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for i in range(images):
        name = f"{i}.png"
        data["images"].append({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for k in range(4):
            w, h = rng.integers([14, 6], [30, 12]).tolist()
            x, y = rng.integers([20, 5], [WIDTH - w, HEIGHT - h]).tolist()
            polygon = [x + 2, y, x + w, y + 1, x + w - 2, y + h, x, y + h - 1]
            mask = [polygon]
            rle = mask_util.merge(mask_util.frPyObjects(mask, HEIGHT, WIDTH))
            area = float(mask_util.area(rle))
            if k == 3:
                counts = np.diff(np.flatnonzero(np.diff(mask_util.decode(rle).T.ravel())) + 1)
                first = int(np.flatnonzero(mask_util.decode(rle).T.ravel())[0])
                runs = [first, *counts.tolist()]
                mask = {"size": [HEIGHT, WIDTH], "counts": [*runs, WIDTH * HEIGHT - sum(runs)]}
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "area": area,
                    "segmentation": mask,
                }
            )
    return data


def boxes(change):
    return lambda a: a.update(bbox=change(*a["bbox"]))


def polygons(change):
    def do(a):
        if isinstance(a["segmentation"], list):
            points = np.array(a["segmentation"][0], float).reshape(-1, 2)
            a["segmentation"] = [change(points).ravel().tolist()]

    return do


def row_major(a):
    if isinstance(a["segmentation"], dict):
        rle = mask_util.frPyObjects(a["segmentation"], HEIGHT, WIDTH)
        turned = np.asfortranarray(mask_util.decode(rle).T)
        counts = mask_util.encode(turned)["counts"].decode()
        a["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}


def both(*changes):
    return lambda a: [change(a) for change in changes]


def half_of_them(change):
    return lambda a: change(a) if a["id"] % 2 else None


SIZE = np.array([WIDTH, HEIGHT])
SWAP = boxes(lambda x, y, w, h: [y, x, h, w])

# name: (change of every annotation, words of the error, words of no error)
MISTAKES = {
    "two corners": (
        boxes(lambda x, y, w, h: [x, y, x + w, y + h]),
        r"^48 of 48 boxes fit their masks if read as \[x0, y0, x1, y1\]; they must be \[x, y, w",
        " or ",
    ),
    "two corners in half of them": (
        half_of_them(boxes(lambda x, y, w, h: [x, y, x + w, y + h])),
        r"^24 of 48 boxes .* read as \[x0, y0, x1, y1\]",
        " or ",
    ),
    "centres": (
        boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]),
        r"read as \[center x, center y, width, height\];",
        " or ",
    ),
    "centres in fractions": (
        boxes(lambda x, y, w, h: [(x + w / 2) / 90, (y + h / 2) / 50, w / 90, h / 50]),
        "all boxes lie within 0..1",
        None,
    ),
    "a third of the boxes in fractions": (
        lambda a: (
            boxes(lambda x, y, w, h: [x / 90, y / 50, w / 90, h / 50])(a) if a["id"] % 3 else None
        ),
        "32 of 48 boxes lie within 0..1 .*pixels, not fractions",
        None,
    ),
    "boxes swapped": (SWAP, r"read as \[y, x, height, width\];", "polygons fit"),
    "corners swapped": (
        boxes(lambda x, y, w, h: [y, x, y + h, x + w]),
        r"read as \[y0, x0, y1, x1\];",
        " or ",
    ),
    "polygons swapped": (
        polygons(lambda points: points[:, ::-1]),
        r"^3\d of 48 polygons fit their boxes if x and y are swapped",
        "boxes fit",
    ),
    "boxes and polygons swapped": (
        both(SWAP, polygons(lambda points: points[:, ::-1])),
        "would not with x and y swapped",
        None,
    ),
    "polygons in fractions": (
        polygons(lambda points: points / SIZE),
        "^36 of 48 annotations have a polygon within 0..1",
        None,
    ),
    "half of the polygons in fractions": (
        half_of_them(polygons(lambda points: points / SIZE)),
        "of 48 annotations have a polygon within 0..1",
        None,
    ),
    "a second polygon in fractions": (
        lambda a: (
            a["segmentation"].append([0.1, 0.1, 0.3, 0.1, 0.3, 0.3])
            if isinstance(a["segmentation"], list)
            else None
        ),
        "^36 of 48 annotations have a polygon within 0..1",
        None,
    ),
    "x of the polygons in fractions": (
        polygons(lambda points: points / [WIDTH, 1]),
        "polygons fit their boxes if x is read in fractions of the image; both",
        None,
    ),
    "row-major RLE": (row_major, "^12 of 48 RLE masks fit their boxes if read row by row", " or "),
    "masks of other objects": (
        boxes(lambda x, y, w, h: [1, 1, 15, 3]),
        "boxes and masks of 48 of 48 annotations lie in different places .* mixed up",
        None,
    ),
}


def set_errors(data):
    return [p.text for p in entry_problems(data) if p.severity == "error" and p.annotation == ""]


@pytest.mark.parametrize("name", MISTAKES)
def test_the_likely_cause_is_named(name):
    change, words, others = MISTAKES[name]
    data = sound_data()
    for annotation in data["annotations"]:
        change(annotation)
    errors = set_errors(data)
    matching = [text for text in errors if re.search(words, text)]
    assert len(matching) == 1, errors
    assert others is None or others not in matching[0]
    assert "\n" not in matching[0]


def test_what_cannot_be_told_apart_is_said_together():
    data = sound_data()
    data["annotations"] = [a for a in data["annotations"] if isinstance(a["segmentation"], list)]
    for image in data["images"]:
        image["height"] = WIDTH  # square images
    for annotation in data["annotations"]:
        SWAP(annotation)
    (text,) = set_errors(data)
    assert "boxes fit their masks if read as [y, x, height, width]" in text
    assert ", or polygons fit their boxes if x and y are swapped" in text


@pytest.mark.parametrize("name", ["two corners", "boxes swapped", "polygons in fractions"])
def test_one_mistake_among_many_annotations_is_no_error(name):
    data = sound_data()
    MISTAKES[name][0](data["annotations"][0])
    problems = entry_problems(data)
    assert not set_errors(data) and {p.severity for p in problems} == {"warning"}


def test_objects_that_reach_below_the_image_are_not_taken_for_swapped():
    data = sound_data()
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        polygon = [x, y, x + w, y, x + w, HEIGHT + 9, x, HEIGHT + 9]
        bbox = [x, y, w, HEIGHT + 9 - y]
        annotation.update(bbox=bbox, segmentation=[polygon], area=bbox[2] * bbox[3])
    assert not set_errors(data)


def test_sound_data_have_no_problem():
    assert entry_problems(sound_data()) == []


def test_every_annotation_twice_is_an_error_and_one_copy_a_warning():
    data = sound_data()
    again = copy.deepcopy(data["annotations"])
    for annotation in again:
        annotation["id"] += 1000
    data["annotations"].append(again[5])
    (problem,) = entry_problems(data)
    assert (problem.severity, problem.annotation) == ("warning", 1006)
    assert problem.text == "is a copy of annotation 6"
    data["annotations"] = data["annotations"][:-1] + again
    assert set_errors(data) == [
        "48 of 96 annotations are copies of others; was a file merged with itself?"
    ]


def test_objects_of_one_box_with_other_masks_are_no_copies():
    data = sound_data()
    first = data["annotations"][0]
    x, y, w, h = first["bbox"]
    other = copy.deepcopy(first)
    other.update(id=1000, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], area=w * h)
    data["annotations"].append(other)
    assert entry_problems(data) == []


def test_a_file_listed_twice_is_an_error():
    data = sound_data()
    data["images"].append({**data["images"][0], "id": 77, "file_name": "./0.png"})
    (problem,) = entry_problems(data)
    assert problem.severity == "error" and problem.image == "./0.png"
    assert problem.text.startswith("is listed twice, with the ids 0 and 77")


def test_an_area_that_evaluation_would_leave_out_is_an_error_there(small_dataset):
    small_dataset.first["area"] = -24
    small_dataset.write()
    text = "has area -24; evaluation leaves the object out"
    (problem,) = small_dataset.check().problems
    assert (problem.severity, problem.text, problem.annotation) == ("warning", text, 1)
    assert [p.text for p in small_dataset.check(evaluated=True).of("error")] == [text]


def test_wrong_areas_are_one_warning():
    data = sound_data()
    for annotation in data["annotations"][10:30]:
        annotation["area"] *= 3
    (problem,) = entry_problems(data)
    assert problem.severity == "warning"
    assert "the area of 20 of 48 annotations is not that of their masks" in problem.text
    assert "(e.g. annotation 11: " in problem.text


def test_areas_of_the_boxes_are_told():
    data = sound_data()
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["area"] = w * h
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    (problem,) = entry_problems(data)
    assert problem.severity == "warning" and "is that of their boxes, not of" in problem.text


def test_the_area_of_a_polygon_that_crosses_itself_is_that_of_its_drawing():
    data = sound_data()
    polygon = [20, 10, 60, 40, 60, 10, 20, 40]
    rle = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    area = float(mask_util.area(rle))
    assert area > 500
    data["annotations"][0].update(bbox=[20, 10, 40, 30], segmentation=[polygon], area=area)
    assert entry_problems(data) == []


@pytest.mark.parametrize(
    "polygon",
    [
        [2, 2, 5, 5, 8, 8],
        [3.1, 3.1, 3.3, 3.1, 3.3, 3.3],
        [1, 1, 9, 7, 1, 1, 9, 7],
    ],
)
def test_a_polygon_that_covers_no_pixel_is_told(small_dataset, polygon):
    x, y = polygon[0::2], polygon[1::2]
    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    small_dataset.first.update(segmentation=[polygon], bbox=box, area=0)
    small_dataset.write()
    drawn = mask_util.area(mask_util.frPyObjects([polygon], 10, 12))[0]
    kinds = [p.kind for p in small_dataset.check().of("warning")]
    assert kinds == (["mask-empty"] if not drawn else [])
    assert not drawn or polygon[0] == 2  # a diagonal is drawn as a staircase


@pytest.mark.parametrize("value", [1e9, -1e9, 10**400, 2000])
def test_a_coordinate_far_away_is_refused_before_it_is_drawn(small_dataset, value):
    small_dataset.first["segmentation"] = [[1, 1, value, 1, 9, 7]]
    small_dataset.write()
    with pytest.raises(UserError, match="annotation 1 has a polygon with the coordinate .* far"):
        small_dataset.load()


@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_the_mapper_refuses_it_as_well(small_dataset, mask_format):
    from d2ext.data import InstanceSegMapper

    mapper = InstanceSegMapper(
        True, augmentations=[], semantic="none", mask_format=mask_format, num_classes=2
    )
    annotation = {"bbox": [1, 1, 8, 6], "bbox_mode": 1, "category_id": 0, "id": 5}
    record = {"file_name": str(small_dataset.images / "a.png"), "width": 12, "height": 10}
    for polygon in ([1, 1, 1e9, 1, 9, 7], [1, 1, True, 1, 9, 7]):
        annotation["segmentation"] = [polygon]
        with pytest.raises(UserError, match="annotation 5 of .* has a polygon with"):
            mapper({**record, "annotations": [annotation]})


def test_a_bool_in_a_polygon_is_refused(small_dataset):
    small_dataset.first["segmentation"] = [[1, 1, 9, True, 9, 7]]
    small_dataset.write()
    with pytest.raises(UserError, match="annotation 1 has a polygon with an entry that is no num"):
        small_dataset.load()
