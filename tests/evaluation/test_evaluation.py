"""Evaluators by data set type, and their results against pycocotools on hand-made predictions."""

import contextlib
import io
import json
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from d2ext.data import register_coco_dataset
from d2ext.errors import UserError
from d2ext.evaluation import (
    InstanceEvaluator,
    VOCSDSEvaluator,
    build_evaluator,
    run_inference,
)

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

HEIGHT, WIDTH = 60, 80
# (image, category id, x1, y1, x2, y2, crowd)
TRUTH = [
    (1, 3, 5, 5, 25, 30, 0),
    (1, 3, 40, 10, 75, 50, 0),
    (1, 7, 30, 30, 38, 38, 0),
    (2, 7, 10, 10, 60, 55, 0),
    (2, 3, 0, 0, 9, 9, 1),
]
# (image, class index, x1, y1, x2, y2, score): good, shifted, doubled, of a wrong class, in the
# crowd region, and one object that nobody finds
FOUND = [
    (1, 0, 5, 5, 25, 30, 0.9),
    (1, 0, 43, 12, 75, 50, 0.8),
    (1, 0, 6, 6, 25, 29, 0.7),
    (1, 0, 30, 30, 38, 38, 0.6),
    (2, 1, 14, 12, 60, 50, 0.5),
    (2, 0, 1, 1, 8, 8, 0.4),
]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULTS = "out/inference/toy/coco_instances_results.json"


def mask_of(x1, y1, x2, y2):
    """The ellipse that fills a box."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    u, v = (x - (x1 + x2) / 2) / ((x2 - x1) / 2), (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
    return u**2 + v**2 <= 1


def found_mask(x1, y1, x2, y2):
    """Narrower than the box, so that masks and boxes do not give the same numbers."""
    return mask_of(x1 + 3, y1, x2, y2)


def rle_of(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.fixture
def toy(tmp_path):
    """A registered COCO set of two images with category ids that are not contiguous."""
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": int(mask_of(x1, y1, x2, y2).sum()),
            "segmentation": rle_of(mask_of(x1, y1, x2, y2)),
            "iscrowd": crowd,
        }
        for number, (image, category, x1, y1, x2, y2, crowd) in enumerate(TRUTH, start=1)
    ]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    truth = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    (tmp_path / "1.png").touch()  # never opened
    register_coco_dataset("toy", str(path), str(tmp_path))
    return "toy"


class Finder(nn.Module):
    """Returns the hand-made predictions of an image."""

    def __init__(self, found=FOUND):
        super().__init__()
        self.found = found

    def forward(self, batch):
        outputs = []
        for record in batch:
            found = [f for f in self.found if f[0] == record["image_id"]]
            boxes = torch.tensor([f[2:6] for f in found], dtype=torch.float32).reshape(-1, 4)
            masks = np.array([found_mask(*f[2:6]) for f in found]).reshape(-1, HEIGHT, WIDTH)
            instances = Instances((HEIGHT, WIDTH))
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.tensor([f[6] for f in found])
            instances.pred_classes = torch.tensor([f[1] for f in found], dtype=torch.int64)
            instances.pred_masks = torch.from_numpy(masks).bool()
            outputs.append({"instances": instances})
        return outputs


def expected_results(json_file, kind):
    """pycocotools alone."""
    detections = []
    for image, label, x1, y1, x2, y2, score in FOUND:
        detection = {"image_id": image, "category_id": [3, 7][label], "score": score}
        detection["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if kind == "segm":
            del detection["bbox"]
            detection["segmentation"] = rle_of(found_mask(x1, y1, x2, y2))
        detections.append(detection)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, 100 * evaluation.stats[:6]))


def records():
    return [[record] for record in DatasetCatalog.get("toy")]


def test_results_are_those_of_pycocotools(toy):
    model = Finder()
    results = run_inference(model, records(), build_evaluator(toy), toy)
    assert set(results) == {"bbox", "segm"}
    for kind in results:
        expected = expected_results(MetadataCatalog.get(toy).json_file, kind)
        found = {name: results[kind][name] for name in METRICS}
        assert found == pytest.approx(
            {k: v if v >= 0 else float("nan") for k, v in expected.items()}, nan_ok=True
        )
        assert 0 < found["AP"] < 100
    assert results["bbox"]["AP"] != results["segm"]["AP"]
    assert {"AP-cat", "AP-dog"} <= set(results["segm"])


def test_a_model_that_finds_nothing_scores_zero(toy):
    results = run_inference(Finder([]), records(), build_evaluator(toy, metrics=["voc_sds"]))
    assert results["bbox"]["AP"] == results["segm"]["AP50"] == 0.0
    assert results["voc_sds"]["mAPr@0.5"] == results["voc_sds"]["mAPr_vol"] == 0.0


def test_images_without_any_output_count_as_images_where_nothing_was_found(toy):
    first = [r for r in records() if r[0]["image_id"] == 1]
    found = [f for f in FOUND if f[0] == 1]
    half = run_inference(Finder(), first, build_evaluator(toy))
    whole = run_inference(Finder(found), records(), build_evaluator(toy))
    assert half["segm"] == pytest.approx(whole["segm"], nan_ok=True)


def test_predictions_are_written_beside_other_results_of_the_run(toy, tmp_path):
    run_inference(Finder(), records(), build_evaluator(toy, str(tmp_path / "out")))
    path = tmp_path / "out" / "inference" / "toy" / "coco_instances_results.json"
    found = json.loads(path.read_text())
    assert [(f["image_id"], f["category_id"]) for f in found] == [
        (f[0], [3, 7][f[1]]) for f in FOUND
    ]


def test_nothing_is_written_without_a_folder(toy, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_inference(Finder(), records(), build_evaluator(toy))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "kind, metrics, tasks",
    [
        ("coco", [], ["bbox", "segm"]),
        ("coco_panoptic_seg", [], ["bbox", "segm"]),
        ("voc_sds", [], ["voc_sds"]),
        ("coco", ["voc_sds"], ["bbox", "segm", "voc_sds"]),
        ("coco", "boundary", ["bbox", "segm", "boundary"]),
        ("voc_sds", ["coco", "boundary", "voc_sds"], ["bbox", "segm", "boundary", "voc_sds"]),
    ],
)
def test_the_kind_of_data_and_the_named_metrics_are_measured(toy, kind, metrics, tasks):
    MetadataCatalog.get(toy).__dict__["evaluator_type"] = kind
    results = run_inference(Finder(), records(), build_evaluator(toy, metrics=metrics))
    assert list(results) == tasks
    assert all(results[task] for task in tasks)


def test_mapr_of_hand_made_predictions(toy):
    """At 0.5 the two cats are hit; one double and one dog-shaped cat are not. The dog of image 2 is
    hit, the other one is not. The cat in the crowd region is not counted."""
    results = run_inference(Finder(), records(), VOCSDSEvaluator(toy, ious=(0.5, 0.95)))
    metrics = results["voc_sds"]
    assert metrics["APr@0.5-cat"] == pytest.approx(100)
    assert metrics["APr@0.5-dog"] == pytest.approx(100 * 6 / 11)
    assert metrics["mAPr@0.5"] == pytest.approx((100 + 600 / 11) / 2)
    assert metrics["mAPr@0.95"] == 0.0
    assert 0 < metrics["mAPr_vol"] < metrics["mAPr@0.5"]


def test_tables_by_class_are_written(toy, tmp_path):
    evaluator = build_evaluator(toy, str(tmp_path / "out"), metrics=["voc_sds"])
    results = run_inference(Finder(), records(), evaluator)
    folder = tmp_path / "out" / "inference" / "toy"
    segm = json.loads((folder / "segm_by_class.json").read_text())
    assert segm["cat"]["AP"] == pytest.approx(results["segm"]["AP-cat"])
    assert segm["all"]["AP50"] == pytest.approx(results["segm"]["AP50"])
    mapr = json.loads((folder / "voc_sds_by_class.json").read_text())
    assert mapr["all"]["0.7"] == pytest.approx(results["voc_sds"]["mAPr@0.7"])
    assert set(mapr["dog"]) == {f"0.{i}" for i in range(1, 10)}


def test_the_main_process_measures_what_all_processes_found(toy, monkeypatch):
    evaluators = [build_evaluator(toy) for _ in range(2)]
    for evaluator, batch in zip(evaluators, records()):
        evaluator.process(batch, Finder()(batch))
    parts = [list(e._found.values()) for e in evaluators]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    monkeypatch.setattr(comm, "gather", lambda found, dst: parts)
    together = evaluators[0].evaluate()
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluators[1].evaluate() == {}
    monkeypatch.undo()
    alone = run_inference(Finder(), records(), build_evaluator(toy))
    assert together["segm"] == pytest.approx(alone["segm"], nan_ok=True)


def process(evaluator, **changes):
    """Process image 1 with some fields of the output replaced; a callable gets the old value."""
    (batch,) = [r for r in records() if r[0]["image_id"] == 1]
    (output,) = Finder()(batch)
    instances = output["instances"]
    for name, change in changes.items():
        if change is None:
            instances.remove(name)
        else:
            instances.set(name, change(instances.get(name)))
    evaluator.process(batch, [output])


def test_detections_without_masks_have_box_results_only(toy):
    evaluator = build_evaluator(toy)
    process(evaluator, pred_masks=None)
    assert list(evaluator.evaluate()) == ["bbox"]
    evaluator = build_evaluator(toy, metrics=["voc_sds"])
    process(evaluator, pred_masks=None)
    with pytest.raises(UserError, match="metric 'voc_sds' needs masks"):
        evaluator.evaluate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": lambda s: s * float("nan")}, "image 1"),
        ({"pred_masks": lambda m: m[:, :-1]}, r"\(60, 80\), its predicted masks \(59, 80\)"),
        ({"pred_classes": lambda c: c + 2}, "class 2; the data set has 2 classes"),
        ({"pred_classes": lambda c: c - 1}, "the data set has 2 classes"),
    ],
)
def test_broken_predictions_are_refused(toy, changes, message):
    evaluator = InstanceEvaluator(toy)
    with pytest.raises(UserError, match=message):
        process(evaluator, **changes)
        evaluator.evaluate()


def test_outputs_of_another_kind_are_refused(toy):
    with pytest.raises(UserError, match=r"have \['proposals'\] but no 'instances'"):
        InstanceEvaluator(toy).process([{"image_id": 1}], [{"proposals": None}])


def test_images_of_other_data_are_refused(toy):
    evaluator = InstanceEvaluator(toy)
    (output,) = Finder()([{"image_id": 7}])
    evaluator.process([{"image_id": 7}], [output])
    with pytest.raises(UserError, match="image 7, which the data set lacks"):
        evaluator.evaluate()


def test_images_of_another_size_are_refused(toy):
    evaluator = InstanceEvaluator(toy)
    instances = Instances((HEIGHT, WIDTH + 1))
    instances.pred_boxes, instances.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    with pytest.raises(UserError, match=r"\(60, 80\) in the annotations, but \(60, 81\)"):
        evaluator.evaluate()


def test_data_without_annotations_give_a_results_file_only(toy, tmp_path):
    path = tmp_path / "truth.json"
    truth = json.loads(path.read_text())
    del truth["annotations"]
    batches = records()
    path.write_text(json.dumps(truth))
    assert run_inference(Finder(), batches, build_evaluator(toy, str(tmp_path / "out"))) == {}
    assert len(json.loads((tmp_path / RESULTS).read_text())) == len(FOUND)


def test_a_model_that_finds_nothing_writes_an_empty_list(toy, tmp_path):
    run_inference(Finder([]), records(), build_evaluator(toy, str(tmp_path / "out")))
    assert json.loads((tmp_path / RESULTS).read_text()) == []


def test_unknown_metrics_and_thresholds_are_refused(toy):
    with pytest.raises(UserError, match="metric 'lvis'; known: coco, boundary, voc_sds"):
        build_evaluator(toy, metrics=["lvis"])
    with pytest.raises(UserError, match=r"in \(0, 1\], not \[50\]"):
        build_evaluator(toy, mapr_ious=[50])


def test_annotations_of_unknown_categories_are_named(toy, tmp_path):
    path = tmp_path / "truth.json"
    records()  # sets the mapping of the categories
    truth = json.loads(path.read_text())
    truth["annotations"][0]["category_id"] = 8
    path.write_text(json.dumps(truth))
    with pytest.raises(UserError, match="'toy': an annotation of image 1 has the unknown .* 8"):
        build_evaluator(toy)
    path.write_text("{")
    with pytest.raises(UserError, match="truth.json is not valid JSON"):
        build_evaluator(toy)


def test_annotations_whose_masks_cannot_be_compared_are_named(toy, tmp_path):
    path = tmp_path / "truth.json"
    records()
    truth = json.loads(path.read_text())
    for value, message in (
        ([], "an annotation of image 2 has no segmentation"),
        (
            rle_of(np.ones((HEIGHT, WIDTH - 1))),
            r"image 2 is .*\(60, 80\), the mask of .*\(60, 79\)",
        ),
    ):
        truth["annotations"][3]["segmentation"] = value
        path.write_text(json.dumps(truth))
        for metrics in ([], ["voc_sds"]):
            with pytest.raises(UserError, match=message):
                run_inference(Finder(), records_of(truth), build_evaluator(toy, metrics=metrics))


def records_of(truth):
    return [[{"image_id": image["id"]}] for image in truth["images"]]


def test_a_missing_file_is_named(toy, tmp_path):
    (tmp_path / "truth.json").unlink()
    with pytest.raises(UserError, match="truth.json does not exist"):
        build_evaluator(toy)
    DatasetCatalog.register("unmade", lambda: open(tmp_path / "nothing"))
    MetadataCatalog.get("unmade").set(json_file=str(tmp_path / "no.json"), evaluator_type="coco")
    with pytest.raises(UserError, match="data set 'unmade': annotation file .*no.json does not"):
        build_evaluator("unmade")


def test_data_sets_without_a_file_are_measured_by_their_records(toy):
    loaded = DatasetCatalog.get(toy)
    expected = run_inference(Finder(), records(), build_evaluator(toy))
    names = MetadataCatalog.get(toy).thing_classes
    DatasetCatalog.register("plain", lambda: loaded)
    MetadataCatalog.get("plain").set(thing_classes=names, evaluator_type="coco")
    results = run_inference(Finder(), [[r] for r in loaded], build_evaluator("plain"))
    assert results["segm"] == pytest.approx(expected["segm"], nan_ok=True)


def test_other_kinds_of_data_are_named_with_the_known_ones(toy):
    MetadataCatalog.get(toy).__dict__["evaluator_type"] = "video"
    with pytest.raises(UserError, match="set 'toy' has evaluator_type 'video', for which there is"):
        build_evaluator(toy)
    with pytest.raises(UserError, match="set 'untyped' has evaluator_type None"):
        build_evaluator("untyped")
