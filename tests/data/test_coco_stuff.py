"""COCO with semantic maps: real small files in each layout, from conversion to training input."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2ext.data import (
    InstanceSegMapper,
    check_before_training,
    check_dataset,
    get_dataset_records,
    register_all,
    semantic_num_labels,
)
from d2ext.data.coco_stuff import (
    convert_panoptic,
    convert_pixelmaps,
    panoptic_stuff_labels,
    stuff_from_panoptic,
    stuff_from_pixelmap,
)
from d2ext.errors import UserError

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

THINGS = [c for c in COCO_CATEGORIES if c["isthing"]]
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 18, "name": "dog", "isthing": 1},
    {"id": 92, "name": "banner", "isthing": 0},
    {"id": 200, "name": "rug-merged", "isthing": 0},
]


@pytest.fixture
def coco(tmp_path):
    """A COCO folder with one image of 6 x 8 and a dog; no maps."""
    folder = tmp_path / "coco"
    for name in ("annotations", "val2017", "train2017"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(folder / "val2017/000000000009.jpg")
    annotation = {"id": 5, "image_id": 9, "category_id": 18, "iscrowd": 0, "area": 9.0}
    annotation.update(bbox=[1, 1, 3, 3], segmentation=[[1, 1, 4, 1, 4, 4, 1, 4]])
    data = {
        "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 8, "height": 6}],
        "annotations": [annotation],
        "categories": [{k: c[k] for k in ("id", "name")} for c in THINGS],
    }
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def write_panoptic(coco):
    """Function that writes panoptic files for rows of segment ids; returns what to convert."""

    def write(ids, segments):
        ids = np.array(ids)
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        (coco / "panoptic_val2017").mkdir()
        Image.fromarray(rgb).save(coco / "panoptic_val2017/000000000009.png")
        infos = [{"id": own, "category_id": category} for own, category in segments]
        annotation = {"image_id": 9, "file_name": "000000000009.png", "segments_info": infos}
        data = {"annotations": [annotation], "categories": CATEGORIES, "images": []}
        path = coco / "annotations/panoptic_val2017.json"
        path.write_text(json.dumps(data))
        folders = (coco / "panoptic_val2017", coco / "panoptic_stuff_val2017")
        return [str(p) for p in (path, *folders)]

    return write


def semantic(name):
    labels = semantic_num_labels(name, "dataset")
    mapper = InstanceSegMapper(
        True, augmentations=[], semantic="dataset", num_classes=80, num_semantic_labels=labels
    )
    (record,) = get_dataset_records(name)
    return mapper(record)["sem_seg"].numpy()


def test_maps_of_coco_stuff_serve_as_they_are(coco, tmp_path):
    labels = np.array([[0, 17, 90, 91, 181, 255, 255, 0]] * 6, np.uint8)
    (coco / "stuffthingmaps/val2017").mkdir(parents=True)
    Image.fromarray(labels).save(coco / "stuffthingmaps/val2017/000000000009.png")
    register_all(str(tmp_path))
    assert semantic_num_labels("coco_2017_val_stuff", "auto") == 183
    np.testing.assert_array_equal(semantic("coco_2017_val_stuff"), labels)
    check_before_training(["coco_2017_val_stuff"])


def test_maps_of_the_panoptic_annotations_are_made_and_read(coco, write_panoptic, tmp_path):
    dog, person, rug, banner = 70000, 300, 5, 65536
    rows = [[dog, dog, person, rug, rug, banner, 0, 0]] * 6
    segments = [(dog, 18), (person, 1), (rug, 200), (banner, 92)]
    assert convert_panoptic(*write_panoptic(rows, segments)) == 1
    register_all(str(tmp_path))
    name = "coco_2017_val_panoptic_stuff"
    np.testing.assert_array_equal(semantic(name), [[0, 0, 0, 2, 2, 1, 255, 255]] * 6)
    assert semantic_num_labels(name, "auto") == 54
    assert check_dataset(name).of("error") == []


def test_labels_of_the_panoptic_maps_are_those_of_detectron2():
    metadata = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    mapping = metadata.stuff_dataset_id_to_contiguous_id
    labels = panoptic_stuff_labels(COCO_CATEGORIES)
    things = [c["id"] for c in THINGS]
    assert {labels[i] for i in things} == {0} and len(things) == 80
    assert {k: v for k, v in labels.items() if k not in things} == {
        k: v for k, v in mapping.items() if k != 0
    }


def test_pixel_maps_get_the_numbers_of_coco_stuff(coco, tmp_path):
    palette = Image.fromarray(np.array([[0, 92, 182, 183] * 2] * 6, np.uint8)).convert("P")
    palette.putdata([0, 92, 182, 183] * 12)
    (tmp_path / "pixelmaps").mkdir()
    palette.save(tmp_path / "pixelmaps/000000000009.png")
    out = coco / "stuffthingmaps/val2017"
    assert convert_pixelmaps(str(tmp_path / "pixelmaps"), str(out)) == 1
    register_all(str(tmp_path))
    expected = np.array([[255, 91, 181, 182] * 2] * 6)
    np.testing.assert_array_equal(semantic("coco_2017_val_stuff"), expected)
    np.testing.assert_array_equal(
        stuff_from_pixelmap(np.array([[0, 1, 255]], np.uint8)), [[255, 0, 254]]
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coco_2017_val_stuff", "stuffthingmaps/val2017 does not exist; unpack stuffthingmaps"),
        ("coco_2017_val_panoptic_stuff", "panoptic_stuff_val2017 does not exist; make the maps"),
    ],
)
def test_missing_maps_are_named_with_the_mend(coco, tmp_path, name, words):
    register_all(str(tmp_path))
    with pytest.raises(UserError, match=words) as info:
        check_before_training([name])
    assert "\n" not in str(info.value) and "or use coco_2017_val" in str(info.value)
    with pytest.raises(UserError, match="000000000009.png does not exist; without maps use"):
        semantic(name)
    check_before_training([name], semantic=False)  # nobody reads them


def test_unknown_segments_and_damaged_files_are_refused(write_panoptic, tmp_path):
    json_file, pictures, out = write_panoptic([[7] * 8] * 6, [(8, 1)])
    with pytest.raises(UserError, match="segment 7 is not in the annotations"):
        convert_panoptic(json_file, pictures, out)
    with pytest.raises(ValueError, match="segment 7"):
        stuff_from_panoptic(np.full((1, 1, 3), (7, 0, 0), np.uint8), [], {})
    Path(pictures, "000000000009.png").write_text("no image")
    with pytest.raises(UserError, match="cannot convert"):
        convert_panoptic(json_file, pictures, out)
    Path(json_file).write_text("[]")
    with pytest.raises(UserError, match="is not a COCO panoptic file"):
        convert_panoptic(json_file, pictures, out)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no pixel maps"):
        convert_pixelmaps(str(empty), out)
    Image.new("RGB", (2, 2)).save(empty / "a.png")
    with pytest.raises(UserError, match="has mode RGB"):
        convert_pixelmaps(str(empty), out)
