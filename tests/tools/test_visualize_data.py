"""tools/visualize_data.py: what its pictures show, and mistakes in its arguments."""

import itertools
import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2ext.engine import build_experiment

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode

_CONFIG = "configs/mask_rcnn_tiny.yaml"


def test_panels_show_image_instances_and_semantic_map(script, shapes_few):
    record = DatasetCatalog.get(shapes_few)[0]
    metadata = MetadataCatalog.get(shapes_few)
    picture = script.draw_record(record, metadata, scale=2)
    height, width = 2 * record["height"], 2 * record["width"]
    assert picture.shape == (height, 3 * width, 3) and picture.dtype == np.uint8
    image, instances, semantic = np.split(picture.astype(int), 3, axis=1)
    original = np.asarray(Image.open(record["file_name"]).resize((width, height)))
    assert np.abs(image - original).mean() < 1  # interpolated by another library
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
    drawn = script.draw_ground_truth({"annotations": [annotation]}, metadata, image, scale=4)
    assert (drawn[60:96, 60:96] == 100).all() and (drawn[120, 40:120] != 100).any(axis=1).all()
    assert (script.draw_ground_truth({"annotations": []}, metadata, image, scale=1) == 100).all()


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
        (["--dataset", "shapes_val", "INPUT.ROTATE_90=True"], "is for a config"),
        (["--augmented", "no.yaml"], "config file 'no.yaml' does not exist"),
        (["--augmented", _CONFIG, "--num-images", "0"], "leave out --shuffle"),
        (["--augmented", _CONFIG, "--shuffle", "1"], "leave out --shuffle"),
        (["--augmented", _CONFIG, "DATASETS.TRAIN=[]"], "has no training set"),
        (["--augmented", _CONFIG, "INPUT.LSJ.ENABLE=True"], "nearest: INPUT.LSJ.ENABLED"),
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


def test_large_images_are_made_smaller_and_small_ones_enlarged(script, tmp_path):
    for size, expected in (((3000, 4000), (900, 1200)), ((64, 128), (256, 512))):
        Image.new("RGB", size[::-1]).save(tmp_path / "image.png")
        record = {"file_name": str(tmp_path / "image.png"), "annotations": []}
        picture = script.draw_record(record, Metadata(thing_classes=["cat"]))
        assert picture.shape == (expected[0], 2 * expected[1], 3)


def test_a_folder_of_images_of_one_name_loses_none(script, tmp_path):
    data = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for index, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), (90 * index, 0, 0)).save(tmp_path / folder / "x.png")
        image = {"id": index, "file_name": f"{folder}/x.png", "width": 8, "height": 8}
        data["images"].append(image)
    (tmp_path / "a.json").write_text(json.dumps(data))
    out = tmp_path / "out"
    spec = f"mine={tmp_path}/a.json,{tmp_path}"
    assert script.main(["--register", spec, "--output-dir", str(out)]) == 0
    assert sorted(os.listdir(out)) == ["x.png", "x_2.png"]


@pytest.mark.parametrize("config", ["configs/mask_rcnn_tiny.yaml", "configs/mask_rcnn_tiny.py"])
def test_augmented_pictures_are_what_the_training_loader_gives(
    script, shapes_few, tmp_path, config, capsys
):
    out = tmp_path / "out"
    options = ["INPUT.COPY_PASTE.PROB=1.0", "DATALOADER.NUM_WORKERS=0", "MODEL.DEVICE=cpu"]
    arguments = ["--augmented", config, "--dataset", shapes_few, "--num-images", "3"]
    assert script.main([*arguments, "--scale", "1", "--output-dir", str(out), *options]) == 0
    assert "3 pictures of shapes_few" in capsys.readouterr().out
    data = [f"DATASETS.TRAIN={shapes_few}", f"DATASETS.TEST={shapes_few}"]
    experiment = build_experiment(config, [*options, *data])
    (batch,) = itertools.islice(experiment.build_train_loader(), 1)
    names = sorted(os.listdir(out))
    for number, (name, sample) in enumerate(zip(names, batch), start=1):
        stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
        assert name == f"{number:04d}_{stem}.png"
        picture = np.asarray(Image.open(out / name)).astype(int)
        image = sample["image"].numpy()[::-1].transpose(1, 2, 0)
        plain, drawn = np.split(picture, 2, axis=1)
        np.testing.assert_array_equal(plain, image)
        covered = sample["instances"].gt_masks.tensor.any(0).numpy()
        assert (np.abs(drawn - image).sum(axis=2) > 0)[covered].mean() > 0.9
    assert len(names) == 3


def test_augmented_semantic_map_has_a_panel(script, shapes_few, tmp_path):
    options = ["INPUT.SEMANTIC=instances", "MODEL.DEVICE=cpu", "INPUT.RANDOM_FLIP=none"]
    arguments = ["--augmented", _CONFIG, "--dataset", shapes_few, "--num-images", "1"]
    assert script.main([*arguments, "--output-dir", str(tmp_path / "o"), *options]) == 0
    (name,) = os.listdir(tmp_path / "o")
    panels = np.split(np.asarray(Image.open(tmp_path / "o" / name)).astype(int), 3, axis=1)
    image, _, semantic = panels
    assert np.abs(semantic - image).mean() > 10  # all of it is painted, the background too
