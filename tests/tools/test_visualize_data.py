"""tools/visualize_data.py: what its pictures show, and mistakes in its arguments."""

import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode


def test_panels_show_image_instances_and_semantic_map(script, shapes_few):
    record = DatasetCatalog.get(shapes_few)[0]
    metadata = MetadataCatalog.get(shapes_few)
    picture = script.draw_record(record, metadata, scale=2)
    height, width = 2 * record["height"], 2 * record["width"]
    assert picture.shape == (height, 3 * width, 3) and picture.dtype == np.uint8
    image, instances, semantic = np.split(picture.astype(int), 3, axis=1)
    original = np.asarray(Image.open(record["file_name"]).resize((width, height)))
    np.testing.assert_array_equal(image, original)
    assert np.abs(instances - image).mean() > 3 and np.abs(semantic - image).mean() > 20
    del record["sem_seg_file_name"]
    assert script.draw_record(record, metadata, scale=2).shape[1] == 2 * width


def test_holes_of_masks_stay_unpainted(script):
    mask = np.zeros((40, 40), np.uint8, order="F")
    mask[5:35, 5:35], mask[12:28, 12:28] = 1, 0
    annotation = {"bbox": [5, 5, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    annotation["segmentation"] = mask_util.encode(mask)
    image = np.full((40, 40, 3), 100, np.uint8)
    metadata = Metadata(thing_classes=["ring"])
    drawn = script.draw_instances(image, [annotation], metadata)
    assert (drawn[18:22, 18:22] == 100).all() and (drawn[30, 10:30] != 100).any(axis=1).all()
    assert (script.draw_instances(image, [], metadata) == 100).all()


def test_registered_files_are_drawn(script, shapes_root, tmp_path, capsys):
    folder = os.path.join(shapes_root, "shapes", "train")
    spec = f"mine={folder}/annotations.json,{folder}/images,{folder}/semantic"
    out = tmp_path / "out"
    arguments = ["--register", spec, "--output-dir", str(out), "--num-images", "2", "--scale", "1"]
    assert script.main(arguments) == 0
    assert sorted(os.listdir(out)) == ["000001.png", "000002.png"]
    assert "2 pictures of mine" in capsys.readouterr().out
    assert script.main([*arguments, "--shuffle", "3"]) == 0
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
def test_mistakes_end_in_one_line(script, arguments, match, capsys):
    assert script.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and match in error and error.count("\n") == 1


def test_unreadable_image_is_named(script, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"nothing")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    spec = f"mine={tmp_path}/a.json,{tmp_path}"
    assert script.main(["--register", spec, "--output-dir", str(tmp_path / "o")]) == 1
    assert "cannot read" in capsys.readouterr().err
