"""Evaluators by data set type, and their results against pycocotools on hand-made predictions."""

import contextlib
import io
import json
import os
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from d2ext import compat
from d2ext.data import register_coco_dataset
from d2ext.errors import UserError
from d2ext.evaluation import build_evaluator, run_inference

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
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
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
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
    model = Finder().train()
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


def test_the_model_runs_without_gradients_in_evaluation_mode_and_returns_to_training(toy):
    model = Finder().train()
    run_inference(model, records(), build_evaluator(toy))
    assert model.modes == [(False, False)] * 2 and model.training


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")
def test_a_model_that_finds_nothing_has_no_results_but_no_error(toy):
    results = run_inference(Finder([]), records(), build_evaluator(toy))
    assert all(np.isnan(results["bbox"][name]) for name in METRICS)


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


@pytest.mark.parametrize("kind", ["coco", "coco_panoptic_seg"])
@pytest.mark.parametrize("compiled", [False, True])
def test_coco_data_get_the_fast_evaluator_only_with_the_extension(toy, monkeypatch, kind, compiled):
    asked = []

    class Recorder(COCOEvaluator):
        def __init__(self, *args, use_fast_impl=True, **options):
            asked.append(use_fast_impl)
            super().__init__(*args, use_fast_impl=use_fast_impl, **options)

    monkeypatch.setattr("d2ext.evaluation.build.COCOEvaluator", Recorder)
    monkeypatch.setattr(compat, "has_compiled_detectron2", lambda: compiled)
    MetadataCatalog.get(toy).__dict__["evaluator_type"] = kind
    assert isinstance(build_evaluator(toy), Recorder) and asked == [compiled]


def test_other_kinds_of_data_are_named_with_the_known_ones(toy):
    MetadataCatalog.get(toy).__dict__["evaluator_type"] = "video"
    with pytest.raises(UserError, match="set 'toy' has evaluator_type 'video', for which there is"):
        build_evaluator(toy)
    with pytest.raises(UserError, match="set 'untyped' has evaluator_type None"):
        build_evaluator("untyped")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, main_process=True):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(comm, "is_main_process", lambda: main_process)
    run_inference(Finder(), records(), build_evaluator("toy"), "toy set")
    return stream.getvalue()


def test_progress_is_shown_on_terminals_by_the_main_process(toy, monkeypatch):
    assert "toy set" in shown(monkeypatch, Terminal())
    assert shown(monkeypatch, io.StringIO()) == ""
    assert shown(monkeypatch, Terminal(), main_process=False) == ""
