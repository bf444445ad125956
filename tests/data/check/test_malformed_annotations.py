"""Every malformed annotation file gives one clear line or correct data, never wrong data silently:
through registration, loader and mapper, and in the report of the data check."""

import numpy as np
import pytest

from d2ext.data import check_files
from d2ext.errors import UserError
from d2ext.evaluation.ground_truth import load_ground_truth

NAN, INF = float("nan"), float("inf")
BLOCK = np.zeros((10, 12), bool)
BLOCK[5:9, 6:11] = True
RUNS = [int(n) for n in np.diff(np.flatnonzero(np.diff(BLOCK.T.ravel(), prepend=0, append=0)))]
RUNS = [65, *RUNS, 120 - 65 - sum(RUNS)]  # 65 pixels lie before the block, column by column


def first(**changes):
    return lambda d: d.first.update(changes)


def second(**changes):
    return lambda d: d.second.update(changes)


def image(**changes):
    return lambda d: d.data["images"][0].update(changes)


def section(name, value):
    return lambda d: d.data.__setitem__(name, value)


def without(name, key):
    return lambda d: d.data[name][0].pop(key)


def remove(name):
    return lambda d: d.data.pop(name)


def rle(counts, size=(10, 12)):
    return second(segmentation={"size": list(size), "counts": counts})


TRIANGLE = [1, 1, 9, 1, 9, 7]

# name: (change of the valid data set, words of the error)
REFUSED = {
    "no images list": (remove("images"), "has no list 'images'"),
    "no annotations list": (remove("annotations"), "has no list 'annotations'"),
    "no categories list": (remove("categories"), "has no list 'categories'"),
    "annotations is an object": (section("annotations", {"1": {}}), "has no list 'annotations'"),
    "annotation is a list": (section("annotations", [[1, 2]]), r"annotations\[0\] is no object"),
    "categories without names": (without("categories", "name"), r"categories\[0\] has no 'name'"),
    "category id is text": (section("categories", [{"id": "7", "name": "a"}]), "category id '7'"),
    "no images": (section("images", []), "has no images"),
    "no categories": (section("categories", []), "has no categories"),
    "image without width": (without("images", "width"), r"images\[0\] has no 'width'"),
    "image without file name": (without("images", "file_name"), "has no 'file_name'"),
    "file name is a number": (image(file_name=5), "has the file_name 5"),
    "file name is empty": (image(file_name=""), "has the file_name ''"),
    "width is text": (image(width="12"), "has width '12'"),
    "width is fractional": (image(width=12.5), "has width 12.5"),
    "height is zero": (image(height=0), "has height 0"),
    "image id is null": (image(id=None), "image a.png has the id None"),
    "image id is text": (image(id="4"), "annotation 1 has unknown image_id 4"),
    "two images of one id": (
        lambda d: d.data["images"].append({**d.data["images"][0], "file_name": "b.png"}),
        "image b.png has the id 4 of another image",
    ),
    "image ids of two types": (
        lambda d: d.data["images"].append({**d.data["images"][0], "id": "x"}),
        "partly numbers and partly text",
    ),
    "two annotations of one id": (second(id=1), "annotation 1 has the id of another annotation"),
    "unknown image": (first(image_id=5), "annotation 1 has unknown image_id 5"),
    "unknown category": (first(category_id=1), "annotation 1 has unknown category_id 1"),
    "category id is a list": (
        first(category_id=[7]),
        r"unknown category_id \[7\]",
    ),
    "annotation without bbox": (without("annotations", "bbox"), "has no 'bbox'"),
    "bbox of three numbers": (first(bbox=[1, 1, 8]), r"annotation 1 has a bbox that is not \[x"),
    "bbox of text": (
        first(bbox=["1", "1", "8", "6"]),
        "annotation 1 .* of finite numbers",
    ),
    "bbox with NaN": (first(bbox=[1, NAN, 8, 6]), "annotation 1 has the bbox .*nan"),
    "bbox with infinity": (first(bbox=[1, 1, INF, 6]), "annotation 1 has the bbox .*inf"),
    "bbox of negative size": (first(bbox=[9, 7, -8, -6]), "annotation 1 has the bbox .* negative"),
    "fractions of the image": (
        lambda d: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in d.data["annotations"]],
        "must be pixels, not fractions",
    ),
    "iscrowd is text": (first(iscrowd="no"), "annotation 1 has iscrowd 'no'"),
    "ignore is set": (first(ignore=1), "annotation 1 has 'ignore'"),
    "area is text": (first(area="24"), "annotation 1 has area '24'"),
    "no segmentation": (without("annotations", "segmentation"), "has no 'segmentation'"),
    "empty segmentation": (first(segmentation=[]), "annotation 1 has no segmentation"),
    "segmentation is null": (first(segmentation=None), "annotation 1 has no segmentation"),
    "segmentation is text": (first(segmentation="mask"), "annotation 1 has a segmentation of type"),
    "polygon not in a list": (first(segmentation=TRIANGLE), "annotation 1 .* no list of lists"),
    "polygon of points": (
        first(segmentation=[[[1, 1], [9, 1], [9, 7]]]),
        "annotation 1 has a polygon with an entry that is no number",
    ),
    "polygon of text": (first(segmentation=[["1"] * 6]), "annotation 1 .* entry that is no number"),
    "polygon with NaN": (first(segmentation=[[*TRIANGLE[:5], NAN]]), "annotation 1 .* NaN"),
    "polygon with infinity": (
        first(segmentation=[[*TRIANGLE[:5], INF]]),
        "1 .* infinity",
    ),
    "polygon of odd length": (first(segmentation=[[*TRIANGLE, 3]]), "annotation 1 .* 7 numbers"),
    "second polygon of odd length": (first(segmentation=[TRIANGLE, [1, 2, 3]]), "1 .* 3 numbers"),
    "RLE of another size": (
        rle("0d0", (4, 5)),
        r"annotation 2 .* \[4, 5\], image \[10,",
    ),
    "RLE without size": (second(segmentation={"counts": "0d0"}), "annotation 2 .*'size'"),
    "RLE without counts": (second(segmentation={"size": [10, 12]}), "annotation 2 .*'counts'"),
    "RLE whose runs end early": (
        rle("0d0"),
        "annotation 2 has an RLE mask of 20 pixels",
    ),
    "RLE that is cut off": (rle("P"), "annotation 2 has an RLE mask that cannot be decoded"),
    "RLE of other characters": (rle("öl"), "annotation 2 .* cannot be decoded"),
    "uncompressed RLE too short": (rle([0, 20]), "annotation 2 has an RLE mask of 20 pixels"),
    "uncompressed RLE too long": (rle([0, 200]), "annotation 2 has an RLE mask of 200 pixels"),
    "uncompressed RLE negative": (rle([0, -3, 123]), "annotation 2 .* cannot be decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(small_dataset, name):
    change, words = REFUSED[name]
    change(small_dataset)
    small_dataset.write()
    with pytest.raises(UserError, match=words) as info:
        small_dataset.load()
    assert "\n" not in str(info.value) and "annotations.json" in str(info.value)
    try:
        errors = small_dataset.check().of("error")
    except UserError:
        return  # no COCO file at all
    assert errors and errors[0].line() in str(info.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [', "is not valid JSON: .* at line 1 column 13"),
        ("", "is not valid JSON"),
        ("[]", "its top level is no object"),
        ("null", "its top level is no object"),
        ("[" * 100000, "cannot read .*annotations.json"),
    ],
)
def test_a_file_without_structure_is_refused_in_one_line(small_dataset, text, words):
    small_dataset.write(text)
    with pytest.raises(UserError, match=words) as info:
        small_dataset.load()
    assert "\n" not in str(info.value)


def test_a_folder_or_binary_file_is_refused(small_dataset, tmp_path):
    roots = small_dataset.roots()[1:]
    with pytest.raises(UserError, match="annotation file .*images is a folder, no COCO file"):
        check_files("x", str(tmp_path / "images"), *roots)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="x.json is not UTF-8"):
        check_files("x", str(tmp_path / "x.json"), *roots)


def test_a_byte_order_mark_is_accepted(small_dataset):
    small_dataset.write()
    text = small_dataset.json_file.read_bytes()
    small_dataset.json_file.write_bytes(b"\xef\xbb\xbf" + text)
    both(small_dataset.load())
    assert not small_dataset.check(evaluated=True).problems
    assert len(load_ground_truth("small").images) == 1


def masks(out):
    return out["instances"].gt_masks.tensor.numpy()


def both(out):
    """Both objects are there, the second with its exact mask."""
    assert out["instances"].gt_classes.tolist() == [0, 1]
    np.testing.assert_array_equal(masks(out)[1], BLOCK)


def only_second(out):
    assert out["instances"].gt_classes.tolist() == [1]
    np.testing.assert_array_equal(masks(out)[0], BLOCK)


def tight(out):
    """As `both`; the boxes are those of the masks, whatever the file says."""
    both(out)
    assert out["instances"].gt_boxes.tensor[1].tolist() == [6, 5, 11, 9]


# name: (change, check of the training input, kinds of warnings)
ACCEPTED = {
    "nothing wrong": (lambda d: None, tight, []),
    "iscrowd missing": (lambda d: [a.pop("iscrowd") for a in d.data["annotations"]], both, []),
    "area missing": (lambda d: [a.pop("area") for a in d.data["annotations"]], both, []),
    "ids from 0": (first(id=0), both, []),
    "ids of text": (
        lambda d: [image(id="x")(d), first(image_id="x", id="a")(d), second(image_id="x")(d)],
        both,
        [],
    ),
    "uncompressed RLE": (rle(RUNS), both, []),
    "crowd is no instance": (first(iscrowd=1), only_second, []),
    "box of zero area": (first(bbox=[1, 1, 8, 0]), only_second, ["box-empty"]),
    "box outside": (first(bbox=[50, 50, 8, 6]), only_second, ["box-outside", "box-mask"]),
    "box reaching out": (second(bbox=[6, 5, 50, 40]), tight, ["box-beyond", "box-mask"]),
    "box of another object": (second(bbox=[0, 0, 3, 3]), tight, ["box-mask"]),
    "polygon of two points": (first(segmentation=[[1, 1, 9, 7]]), only_second, ["polygon-points"]),
    "one polygon of two points": (
        first(segmentation=[TRIANGLE, [1, 1, 9, 7]]),
        both,
        ["polygon-points"],
    ),
    "polygon outside": (
        first(segmentation=[[50, 50, 60, 50, 60, 60]]),
        only_second,
        ["mask-outside"],
    ),
    "empty RLE": (
        lambda d: d.first.update(segmentation={"size": [10, 12], "counts": [120]}),
        only_second,
        ["mask-empty"],
    ),
    "category without annotation": (
        lambda d: d.data["categories"].append({"id": 11, "name": "cow"}),
        both,
        ["unused-category"],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_gives_correct_data(small_dataset, name):
    change, expected, kinds = ACCEPTED[name]
    change(small_dataset)
    small_dataset.write()
    expected(small_dataset.load(num_classes=3))
    report = small_dataset.check()
    assert [p.kind for p in report.of("warning")] == kinds and not report.of("error")


def test_what_only_evaluation_misreads_is_an_error_there(small_dataset):
    small_dataset.first["segmentation"] = [[1, 1, 9, 7]]
    small_dataset.write()
    assert [p.severity for p in small_dataset.check().problems] == ["warning"]
    (problem,) = small_dataset.check(evaluated=True).of("error")
    assert problem.line() == (
        "annotation 1 has a polygon of fewer than 3 points; training leaves it out, "
        "evaluation cannot"
    )
