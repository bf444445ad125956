"""Every format: what is written is read back as what was found."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from d2ext.cli.convert import main as convert
from d2ext.errors import UserError
from d2ext.inference import ImageRecord, Prediction, Source
from d2ext.inference.results import category_ids, image_result
from d2ext.inference.writers import FORMATS, build_writers
from d2ext.inference.writers.coco import coco_results

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

NAMES = ["disk", "ring 2"]
SIZE = (40, 60)


def found_in(seed, masks=True):
    """Three instances, one of them a ring, one of two parts; the last has a low score."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 20, 2).tolist()
    drawn = np.zeros((3, *SIZE), bool)
    drawn[0, y : y + 15, x : x + 20] = True
    drawn[0, y + 4 : y + 8, x + 3 : x + 9] = False
    drawn[1, 2:9, 40:55] = drawn[1, 20:25, 30:41] = True
    drawn[2, :5, :5] = True
    boxes = [[x, y, x + 20, y + 15], [30.5, 2, 55, 25], [0, 0, 5, 5]]
    instances = Instances(SIZE, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    instances.scores = torch.tensor([0.75, 0.5, 0.25])
    instances.pred_classes = torch.tensor([1, 0, 1])
    if masks:
        instances.pred_masks = torch.from_numpy(drawn)
    return instances


@pytest.fixture
def photos(tmp_path):
    """Three images; nothing will be found in the last one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def write(photos, tmp_path):
    """Function: write predictions for the photos in some formats; the folder."""

    def write_formats(*formats, masks=True, source=None, pixels=False):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        metadata = Metadata(thing_classes=NAMES)
        writers = build_writers(formats, str(out), NAMES, metadata, source or Source([], 0))
        for number, path in enumerate(sorted(photos.iterdir()), start=1):
            image = cv2.imread(str(path))
            instances = found_in(number, masks)[: 3 if number < 3 else 0]
            record = ImageRecord(number, path.name, "" if pixels else str(path))
            prediction = Prediction(record, {"instances": instances}, image)
            for writer in writers:
                writer.write(image_result(prediction, path.stem, 0.4))
        for writer in writers:
            writer.close()
        assert not [p for p in out.rglob("*.tmp")]
        return out

    return write_formats


def masks_of(path):
    """{(file name, class): mask of all annotations} of a COCO file, by annotation."""
    data = json.loads(path.read_text())
    images = {i["id"]: i for i in data["images"]}
    names = {c["id"]: c["name"] for c in data["categories"]}
    found = []
    for a in data["annotations"]:
        image, code = images[a["image_id"]], a["segmentation"]
        if isinstance(code, list):
            code = mask_util.merge(mask_util.frPyObjects(code, image["height"], image["width"]))
        found.append((image["file_name"], names[a["category_id"]], mask_util.decode(code)))
    return sorted(found, key=lambda x: (*x[:2], x[2].sum())), set(images)


def expected():
    found = []
    for number, name in ((1, "a.png"), (2, "b.png")):
        masks = found_in(number).pred_masks.numpy()
        found += [(name, "ring 2", masks[0]), (name, "disk", masks[1])]
    return sorted(found, key=lambda x: (*x[:2], x[2].sum()))


def assert_same(found, wanted):
    assert [x[:2] for x in found] == [x[:2] for x in wanted]
    for a, b in zip(found, wanted):
        np.testing.assert_array_equal(a[2], b[2])


@pytest.mark.parametrize("name", ["coco", "coco_polygons"])
def test_coco_files_have_the_masks_the_scores_and_all_images(write, name):
    path = write(name.replace("_", "-")) / f"{name}.json"
    found, images = masks_of(path)
    assert_same(found, expected())
    data = json.loads(path.read_text())
    assert images == {1, 2, 3} and [a["id"] for a in data["annotations"]] == [1, 2, 3, 4]
    first = data["annotations"][0]
    assert first["score"] == 0.75 and first["iscrowd"] == 0
    assert first["area"] == expected()[1][2].sum() == 20 * 15 - 4 * 6
    assert data["annotations"][1]["bbox"] == [30.5, 2, 24.5, 23]
    assert isinstance(first["segmentation"], list) is (name == "coco_polygons")


def test_ids_of_categories_are_those_of_the_file_with_the_images(write):
    categories = [{"id": 9, "name": "ring 2"}, {"id": 4, "name": "disk"}]
    out = write("coco", source=Source([], 0, categories))
    data = json.loads((out / "coco.json").read_text())
    assert data["categories"] == [{"id": 4, "name": "disk"}, {"id": 9, "name": "ring 2"}]
    assert category_ids(["a", "b"], categories) == [1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("labelme", ["labelme", "labelme", "--images", "../photos"]),
        ("yolo", ["yolo", "yolo/data.yaml", "--images", "yolo/images"]),
        ("masks", ["masks", "masks", "--images", "../photos"]),
    ],
)
def test_other_formats_are_converted_back_to_the_same_masks(write, monkeypatch, name, words):
    monkeypatch.chdir(write(name))
    words = [*words, "--classes", ",".join(NAMES), "--output", "back.json"]
    assert convert([*words, "--segmentation", "rle"]) == 0
    found, images = masks_of(Path("back.json"))
    assert len(images) == 3
    assert_same(found, expected())


@pytest.mark.parametrize("name", ["labelme", "yolo"])
def test_images_that_are_no_files_are_written_too(write, photos, monkeypatch, name):
    out = write(name, pixels=True)
    folder = out / "yolo/images" if name == "yolo" else out / "labelme"
    for path in photos.iterdir():
        assert not (folder / path.name).is_symlink()
        np.testing.assert_array_equal(cv2.imread(str(folder / path.name)), cv2.imread(str(path)))


def test_links_of_yolo_lead_to_the_images(write, photos):
    images = write("yolo") / "yolo/images"
    assert {p.name: p.resolve() for p in images.iterdir()} == {
        p.name: p.resolve() for p in photos.iterdir()
    }


def test_crops_show_the_objects_and_nothing_else(write, photos):
    crops = write("crops") / "crops"
    assert len(list(crops.iterdir())) == 4
    piece = np.asarray(Image.open(crops / "a_1_ring 2.png"))
    mask, (x, y) = expected()[1][2], found_in(1).pred_boxes.tensor[0, :2].int().tolist()
    assert piece.shape == (15, 20, 4)
    np.testing.assert_array_equal(piece[..., 3] > 0, mask[y : y + 15, x : x + 20])
    whole = np.asarray(Image.open(photos / "a.png"))
    np.testing.assert_array_equal(piece[..., :3], whole[y : y + 15, x : x + 20])


def test_a_model_without_masks_writes_boxes(write):
    out = write("coco", "crops", "labelme", "masks", masks=False)
    data = json.loads((out / "coco.json").read_text())
    assert all("segmentation" not in a for a in data["annotations"])
    assert data["annotations"][0]["area"] == 20 * 15
    assert Image.open(out / "crops/a_1_ring 2.png").mode == "RGB"
    shape = json.loads((out / "labelme/a.json").read_text())["shapes"][0]
    assert len(shape["points"]) == 4 and shape["description"] == "score 0.750"
    assert np.asarray(Image.open(out / "masks/a/ring 2_1.png")).sum() == 255 * 20 * 15


def test_a_table_has_a_row_for_every_image(write):
    pytest.importorskip("pyarrow")
    from d2ext.inference.table import read_rows

    rows = read_rows(str(write("parquet") / "predictions.parquet"))
    assert [(r["image_id"], r["file_name"], r["height"], r["width"]) for r in rows] == [
        (1, "a.png", *SIZE), (2, "b.png", *SIZE), (3, "c.png", *SIZE)
    ]  # fmt: skip
    assert [len(r["detections"]) for r in rows] == [2, 2, 0]
    first = rows[0]["detections"][0]
    assert first["category"] == "ring 2" and first["score"] == 0.75 and first["mask_score"] is None
    mask = mask_util.decode({"size": SIZE, "counts": first["segmentation"]})
    np.testing.assert_array_equal(mask, expected()[1][2])


def test_without_pyarrow_one_line_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        write("parquet")


def test_a_video_has_a_frame_for_each_image(write):
    video = cv2.VideoCapture(str(write("video") / "predictions.mp4"))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 3
    there, frame = video.read()
    assert there and frame.shape == (*SIZE, 3)


def test_results_are_coco_results_with_file_and_class_name():
    instances = found_in(1)[:1]
    first = coco_results(instances, 7, "a/b.jpg", NAMES)[0]
    assert first["file_name"] == "a/b.jpg" and first["category"] == "ring 2"
    assert first["image_id"] == 7 and first["category_id"] == 1
    assert first["bbox"][2:] == [20, 15] and first["score"] == 0.75
    np.testing.assert_array_equal(
        mask_util.decode(first["segmentation"]), instances.pred_masks[0].numpy()
    )


def test_scores_of_masks_are_kept(write):
    instances = found_in(1)
    instances.mask_scores = torch.tensor([0.5, 0.25, 0.1])
    assert [r["mask_score"] for r in coco_results(instances, 7, "a", NAMES)][:2] == [0.5, 0.25]
    result = image_result(Prediction(ImageRecord(1, "a"), {"instances": instances}), "a", 0.4)
    assert result.detections.mask_scores.tolist() == [0.5, 0.25]


def test_results_are_one_list_over_all_images(write):
    results = json.loads((write("results") / "predictions.json").read_text())
    assert [r["image_id"] for r in results] == [1, 1, 2, 2]
    assert {r["category"] for r in results} == set(NAMES)


def test_every_format_can_be_written_at_once(write):
    pytest.importorskip("pyarrow")
    names = {p.name for p in write(*FORMATS).iterdir()}
    files = {"predictions.json", "coco.json", "coco_polygons.json", "predictions.parquet"}
    files |= {"predictions.mp4", "a.png", "b.png", "c.png"}
    assert names == files | {"yolo", "labelme", "masks", "crops"}
