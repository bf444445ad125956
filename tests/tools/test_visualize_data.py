"""The data tools: generating the shapes set ahead of time and drawing ground truth."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2ext.data import shapes

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def visualize_data():
    return _load("visualize_data")


@pytest.fixture
def make_shapes(monkeypatch):
    for name, split in list(shapes.SPLITS.items()):
        monkeypatch.setitem(shapes.SPLITS, name, shapes.Split(3, split.seed))
    return _load("make_shapes_dataset")


def test_shapes_are_written_and_verified(make_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert make_shapes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [os.path.basename(line.split(":")[0]) for line in lines] == ["train", "val"]
    assert all(": 3 images, sha256 " in line for line in lines)
    assert make_shapes.main(["val", "--verify"]) == 0
    # same size, other content: only --verify notices
    annotations = tmp_path / "shapes/val/annotations.json"
    annotations.write_text(annotations.read_text().replace('"bar"', '"BAR"'))
    assert make_shapes.main(["val"]) == 0
    capsys.readouterr()
    assert make_shapes.main(["val", "--verify"]) == 1
    assert "val were changed; delete the folder" in capsys.readouterr().err


def test_unknown_split_ends_in_one_line(make_shapes, tmp_path, capsys):
    assert make_shapes.main(["test", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: unknown shapes split 'test'")


def test_panels_show_image_instances_and_semantic_map(visualize_data, shapes_few):
    record = DatasetCatalog.get(shapes_few)[0]
    metadata = MetadataCatalog.get(shapes_few)
    picture = visualize_data.draw_record(record, metadata, scale=2)
    height, width = 2 * record["height"], 2 * record["width"]
    assert picture.shape == (height, 3 * width, 3) and picture.dtype == np.uint8
    image, instances, semantic = np.split(picture.astype(int), 3, axis=1)
    original = np.asarray(Image.open(record["file_name"]).resize((width, height)))
    np.testing.assert_array_equal(image, original)
    assert np.abs(instances - image).mean() > 3 and np.abs(semantic - image).mean() > 20
    del record["sem_seg_file_name"]
    assert visualize_data.draw_record(record, metadata, scale=2).shape[1] == 2 * width


def test_holes_of_masks_stay_unpainted(visualize_data):
    mask = np.zeros((40, 40), np.uint8, order="F")
    mask[5:35, 5:35], mask[12:28, 12:28] = 1, 0
    annotation = {"bbox": [5, 5, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    annotation["segmentation"] = mask_util.encode(mask)
    image = np.full((40, 40, 3), 100, np.uint8)
    metadata = Metadata(thing_classes=["ring"])
    drawn = visualize_data.draw_instances(image, [annotation], metadata)
    assert (drawn[18:22, 18:22] == 100).all() and (drawn[30, 10:30] != 100).any(axis=1).all()
    assert (visualize_data.draw_instances(image, [], metadata) == 100).all()


def test_registered_files_are_drawn(visualize_data, shapes_root, tmp_path, capsys):
    folder = os.path.join(shapes_root, "shapes", "train")
    spec = f"mine={folder}/annotations.json,{folder}/images,{folder}/semantic"
    out = tmp_path / "out"
    arguments = ["--register", spec, "--output-dir", str(out), "--num-images", "2", "--scale", "1"]
    assert visualize_data.main(arguments) == 0
    assert sorted(os.listdir(out)) == ["000001.png", "000002.png"]
    assert "2 pictures of mine" in capsys.readouterr().out
    assert visualize_data.main([*arguments, "--shuffle", "3"]) == 0
    assert len(os.listdir(out)) > 2


@pytest.mark.parametrize(
    "arguments, match",
    [
        ([], "nothing to draw"),
        (["--dataset", "shapes_vall"], "unknown data set 'shapes_vall'; did you mean shapes_val"),
        (["--register", "mine"], "write NAME=annotations.json"),
        (["--register", "mine=no.json,images"], "annotation file no.json does not exist"),
        (["--dataset", "shapes_val", "--scale", "0"], "--scale must be positive"),
    ],
)
def test_mistakes_end_in_one_line(visualize_data, arguments, match, capsys):
    assert visualize_data.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and match in error and error.count("\n") == 1


def test_unreadable_image_is_named(visualize_data, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"nothing")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    spec = f"mine={tmp_path}/a.json,{tmp_path}"
    assert visualize_data.main(["--register", spec, "--output-dir", str(tmp_path / "o")]) == 1
    assert "cannot read" in capsys.readouterr().err
