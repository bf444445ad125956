"""The built-in shapes data set: determinism, statistics, files on disk and registration."""

import json
import multiprocessing
import os

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2ext.data import register_shapes, shapes
from d2ext.data.shapes.draw import polygon_area, rasterize
from d2ext.data.shapes.scene import make_scene
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

# Regenerate after an intended change of the drawing (and raise shapes.FORMAT_VERSION):
# python -c "from d2ext.data.shapes import *; print(read_manifest(generate('val', '/tmp/s', 8)))"
PINNED_HASH = "a12b1e6eb637688e70bfb17a680aab527552fdb6e456f35d9ac5c52f890a14f6"


@pytest.fixture(scope="module")
def val_folder(tmp_path_factory):
    return shapes.generate("val", str(tmp_path_factory.mktemp("datasets")), num_images=8)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene((shapes.FORMAT_VERSION, 1, i)) for i in range(160)]


def _load(folder):
    with open(os.path.join(folder, "annotations.json")) as f:
        return json.load(f)


def _bytes(folder, relative):
    with open(os.path.join(folder, relative), "rb") as f:
        return f.read()


def test_content_hash_is_pinned(val_folder):
    assert shapes.read_manifest(val_folder)["content_sha256"] == PINNED_HASH


def test_hash_is_recomputed_from_the_files(val_folder):
    assert shapes.content_hash(val_folder) == shapes.read_manifest(val_folder)["content_sha256"]


def test_second_generation_writes_the_same_bytes(val_folder, tmp_path):
    again = shapes.generate("val", str(tmp_path), num_images=8)
    for relative in shapes.read_manifest(val_folder)["file_sizes"]:
        assert _bytes(again, relative) == _bytes(val_folder, relative)


def test_fewer_images_are_a_prefix_of_the_split(val_folder, tmp_path):
    short = shapes.generate("val", str(tmp_path), num_images=3)
    assert _load(short)["images"] == _load(val_folder)["images"][:3]
    name = "images/000003.png"
    assert _bytes(short, name) == _bytes(val_folder, name)


def test_splits_share_no_image():
    firsts = [make_scene((shapes.FORMAT_VERSION, s.seed, 0)).image for s in shapes.SPLITS.values()]
    assert len({s.seed for s in shapes.SPLITS.values()}) == len(shapes.SPLITS)
    assert len({image.tobytes() for image in firsts}) == len(firsts)


def test_annotations_follow_the_coco_conventions(val_folder):
    dataset = _load(val_folder)
    assert set(dataset) == {"info", "licenses", "images", "annotations", "categories"}
    assert [c["id"] for c in dataset["categories"]] == list(range(1, 9))
    ids = [a["id"] for a in dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    sizes = {i["id"]: (i["height"], i["width"]) for i in dataset["images"]}
    for annotation in dataset["annotations"]:
        mask = mask_util.decode(annotation["segmentation"])
        assert mask.shape == sizes[annotation["image_id"]]
        assert annotation["area"] == mask.sum()
        # pycocotools computes the tight box independently
        assert annotation["bbox"] == mask_util.toBbox(annotation["segmentation"]).tolist()


def test_ground_truth_as_detections_scores_full_marks(val_folder, capsys):
    truth = COCO(os.path.join(val_folder, "annotations.json"))
    objects = [{**a, "score": 1.0} for a in truth.dataset["annotations"] if not a["iscrowd"]]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(objects), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_semantic_maps_agree_with_the_instances(val_folder):
    dataset = _load(val_folder)
    for record in dataset["images"]:
        path = os.path.join(val_folder, "semantic", record["file_name"])
        semantic = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        assert semantic.dtype == np.uint8
        assert semantic.shape == (record["height"], record["width"])
        covered = np.zeros(semantic.shape, bool)
        for a in dataset["annotations"]:
            if a["image_id"] == record["id"]:
                mask = mask_util.decode(a["segmentation"]).astype(bool)
                covered |= mask
                assert a["category_id"] - 1 in semantic[mask]
        assert (semantic[covered] < 8).all()
        assert ((semantic[~covered] >= 8) & (semantic[~covered] < 12)).all()


def test_object_counts_sizes_and_classes(scenes):
    counts = np.array([len(s.masks) for s in scenes])
    assert (counts[counts > 0] >= 3).all() and counts.max() == 12
    assert 0 < (counts == 0).sum() < 12
    assert {s.image.shape[:2] for s in scenes} == {(120, 160), (160, 120), (128, 128), (128, 160)}
    categories = np.bincount([c for s in scenes for c in s.categories], minlength=8)
    assert len(categories) == 8 and categories.min() > 0.07 * categories.sum()
    areas = np.array([m.sum() for s in scenes for m in s.masks])
    assert areas.min() >= 20
    assert (areas < 8 * 8).mean() > 0.03 and (areas > 32 * 32).mean() > 0.05
    assert 0.3 < ((areas > 10 * 10) & (areas < 40 * 40)).mean()


def test_crowds_overlaps_cuts_and_truncation_occur(scenes):
    assert 3 <= sum(s.crowd is not None for s in scenes) <= 20
    overlapping = sum(np.sum(s.masks, axis=0).max() > 1 for s in scenes if s.masks)
    assert overlapping > 0.2 * len(scenes)
    masks = [m for s in scenes for m in s.masks]
    parts = [cv2.connectedComponents(m.astype(np.uint8))[0] - 1 for m in masks]
    assert np.mean(np.array(parts) > 1) > 0.05
    at_border = [m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any() for m in masks]
    assert 0.05 < np.mean(at_border) < 0.5


def test_same_class_objects_touch_or_overlap(scenes):
    touching = 0
    for s in scenes:
        grown = [cv2.dilate(m.astype(np.uint8), np.ones((3, 3))).astype(bool) for m in s.masks]
        touching += sum(
            s.categories[i] == s.categories[j] and (grown[i] & s.masks[j]).any()
            for i in range(len(grown))
            for j in range(i)
        )
    assert touching > 0.3 * len(scenes)


def test_coverage_of_a_square_is_exact_inside_and_clipped_at_the_border():
    square = np.array([[-4.0, 3.0], [6.0, 3.0], [6.0, 9.0], [-4.0, 9.0]])
    x0, y0, coverage = rasterize([square], height=20, width=20)
    mask = np.zeros((20, 20), bool)
    mask[y0 : y0 + coverage.shape[0], x0 : x0 + coverage.shape[1]] = coverage > 0.5
    expected = np.zeros((20, 20), bool)
    expected[3:9, 0:6] = True
    np.testing.assert_array_equal(mask, expected)
    assert polygon_area([square]) == 60.0
    assert rasterize([square + 40], height=20, width=20) is None


@pytest.mark.parametrize("damage", ["image", "manifest", "truncated", "version"])
def test_damaged_folder_is_regenerated_with_one_log_line(tmp_path, caplog, damage):
    folder = shapes.generate("train", str(tmp_path), num_images=2)
    manifest_path = os.path.join(folder, "manifest.json")
    manifest = shapes.read_manifest(folder)
    if damage == "image":
        os.remove(os.path.join(folder, "images/000002.png"))
    elif damage == "manifest":
        os.remove(manifest_path)
    elif damage == "truncated":
        os.truncate(os.path.join(folder, "semantic/000001.png"), 10)
    else:
        with open(manifest_path, "w") as f:
            json.dump({**manifest, "format_version": -1}, f)
    caplog.clear()
    with caplog.at_level("INFO", logger="d2ext.data.shapes"):
        assert shapes.generate("train", str(tmp_path), num_images=2) == folder
        shapes.generate("train", str(tmp_path), num_images=2)
    assert len(caplog.records) == 1 and "Regenerating" in caplog.text
    assert shapes.content_hash(folder) == manifest["content_sha256"]
    assert [p for p in os.listdir(tmp_path / "shapes") if p.startswith(".")] == []


def test_two_processes_generate_one_intact_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=shapes.generate, args=("train", str(tmp_path), 6)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    folder = shapes.split_folder("train", str(tmp_path))
    assert shapes.find_damage(folder, "train", 6) is None
    assert shapes.content_hash(folder) == shapes.read_manifest(folder)["content_sha256"]


def test_unknown_split_is_named():
    with pytest.raises(UserError, match="unknown shapes split 'trian'; known: train, val"):
        shapes.generate("trian")


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/shapes/val: .*; set DETECTRON2_DATA"):
        shapes.generate("val", str(tmp_path / "file"), num_images=1)


def test_registered_set_is_generated_on_first_use(tmp_path):
    register_shapes("shapes_few", "val", root=str(tmp_path), num_images=4)
    metadata = MetadataCatalog.get("shapes_few")
    assert metadata.thing_classes == list(shapes.THING_CLASSES)
    assert len(metadata.stuff_classes) == 12 and metadata.evaluator_type == "coco"
    assert not os.path.exists(metadata.json_file)
    records = DatasetCatalog.get("shapes_few")
    assert len(records) == 4 and os.path.isfile(metadata.json_file)
    assert all(os.path.isfile(r["sem_seg_file_name"]) for r in records)
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(8))
