"""From the files of five programs to the same COCO file, and on to a training set."""

import json

import pytest

from d2ext.data import check_files
from d2ext.data.register import parse_register

from tests.data.convert.helpers import CLASSES, FORMATS, PICTURES, drawn

ALL = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def convert(script, tmp_path, capsys):
    """`convert(*arguments)`: (exit status, stdout, stderr, content of the file)."""

    def run(*arguments):
        output = tmp_path / "out/annotations.json"
        status = script.main([*map(str, arguments), "--output", str(output)])
        data = json.loads(output.read_text()) if output.is_file() else None
        return status, *capsys.readouterr(), data

    return run


def test_all_formats_give_the_very_same_file(convert, tmp_path):
    found = {}
    for name, write in FORMATS.items():
        status, _, err, found[name] = convert(*write(tmp_path / name), "--segmentation", "rle")
        assert (status, err) == (0, ""), err
    assert all(data == found["labelme"] for data in found.values())
    data = found["labelme"]
    assert [i["file_name"] for i in data["images"]] == sorted(PICTURES)
    assert [c["name"] for c in data["categories"]] == CLASSES
    objects = [x for objects in PICTURES.values() for x in objects]
    assert [a["id"] for a in data["annotations"]] == [1, 2, 3, 4]
    for annotation, x in zip(data["annotations"], objects):
        mask = drawn(x.polygon)
        assert annotation["category_id"] == CLASSES.index(x.name) + 1
        assert annotation["area"] == mask.sum()
        x0, y0, width, height = annotation["bbox"]
        assert mask[int(y0) : int(y0 + height), int(x0) : int(x0 + width)].sum() == mask.sum()


def test_polygons_stay_polygons(convert, tmp_path):
    names = ("labelme", "yolo", "cvat", "roboflow")
    found = [convert(*FORMATS[name](tmp_path / name))[3] for name in names]
    assert all(data == found[0] for data in found)
    objects = [x for objects in PICTURES.values() for x in objects]
    assert [a["segmentation"] for a in found[0]["annotations"]] == [[x.polygon] for x in objects]
    assert found[0]["annotations"][0]["bbox"] == [4, 4, 16, 18]


@ALL
def test_the_file_passes_the_data_check_as_the_last_line_says(convert, tmp_path, name):
    status, out, _, _ = convert(*FORMATS[name](tmp_path / name))
    assert status == 0
    register = out.strip().splitlines()[-1].partition("--register ")[2]
    assert not check_files(*parse_register(register), thorough=True, evaluated=True).problems


@ALL
def test_giving_the_source_to_register_names_the_conversion(tmp_path, name):
    """Whatever one would give: the file, or the folder that it is in."""
    from d2ext.data import register_coco_dataset
    from d2ext.errors import UserError

    command, source, *_ = FORMATS[name](tmp_path / name)
    given = source.parent if source.is_file() else source
    if name == "cvat":
        given = given.parent
    with pytest.raises(UserError, match=f"convert it: .*d2ext convert {command} "):
        register_coco_dataset("given", str(given), str(tmp_path))
    if name in ("yolo", "labelme"):
        file = source if name == "yolo" else source / "a.json"
        with pytest.raises(UserError, match=f"convert it: .*d2ext convert {command} "):
            register_coco_dataset("given", str(file), str(tmp_path))


def test_mistakes_of_the_command_line_end_in_one_line(convert, tmp_path):
    photos = FORMATS["labelme"](tmp_path / "x")[1]
    for arguments, words in (
        (("labelme", tmp_path / "gone"), "does not exist"),
        (("labelme", photos / "a.json"), "labelme needs a folder"),
        (("yolo", photos), "yolo needs a file"),
        (("masks", photos), "add --images FOLDER"),
        (("labelme", photos, "--classes", "leaf,cell"), "'stone' is not among leaf, cell"),
        (("labelme", photos, "--classes", "leaf,leaf"), "'leaf' is listed twice"),
        (("cvat", photos / "a.json"), "image folder"),
        (("split", photos / "a.json", "--images", photos), "convert it: d2ext convert"),
    ):
        status, _, err, data = convert(*arguments)
        assert status == 1 and words in err and err.count("\n") == 1 and data is None, err


def test_a_split_has_all_images_once_and_is_the_same_for_a_seed(convert, script, tmp_path, capsys):
    folder = FORMATS["cvat"](tmp_path / "x")[1].parents[1]
    convert("cvat", folder / "annotations/instances_default.json")
    source, images = tmp_path / "out/annotations.json", folder / "images/default"
    command = ["split", str(source), "--images", str(images), "--output", str(tmp_path / "parts")]
    texts = []
    for shares in (["0.34", "0.33", "0.33"],) * 2:
        assert script.main([*command, "--shares", *shares, "--seed", "3"]) == 0
        out = capsys.readouterr().out
        texts.append([(tmp_path / f"parts/{n}.json").read_text() for n in script.PARTS])
    assert texts[0] == texts[1]
    assert "note: val has no object of" in out or "note: train has no object of" in out
    names = [i["file_name"] for text in texts[0] for i in json.loads(text)["images"]]
    assert sorted(names) == sorted(PICTURES)
    assert script.main([*command, "--shares", "0.5", "0.2", "0.2"]) == 1
    assert "add up to 1" in capsys.readouterr().err
