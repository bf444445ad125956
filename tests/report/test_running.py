"""Predictions on a data set: the order of the images, stages, speed and memory."""

import numpy as np
import pytest

from d2ext.data import parse_register, register_coco_dataset
from d2ext.engine import Predictor
from d2ext.errors import UserError
from d2ext.report.running import has_stages, predict_records, predict_stages
from d2ext.report.sources import load_truth

CONFIG = "projects/HTC/configs/htc_tiny.py"


@pytest.fixture
def predictor(htc_weights, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    overrides = ["model.backbone.norm=GN", "model.proposal_generator.post_nms_topk=[10,5]"]
    return Predictor(CONFIG, htc_weights, overrides, device="cpu")


@pytest.fixture
def few(register_few):
    register_coco_dataset(*parse_register(register_few))
    return load_truth("demo_few")


def test_detections_are_in_the_order_of_the_truth_with_time_and_memory(predictor, few):
    records, truth = few
    found, speed = predict_records(predictor, records[::-1], truth, "net")
    assert [x.image_id for x in found] == [image.image_id for image in truth.images]
    alone = predictor(records[0]["file_name"])["instances"]
    np.testing.assert_allclose(found[0].scores, alone.scores.numpy(), atol=1e-6)
    assert 0 < speed.seconds < 60 and speed.device.startswith("CPU, ")
    assert speed.memory is None or 50 << 20 < speed.memory < 1 << 40


def test_the_last_stage_is_the_whole_model(predictor, few):
    records, truth = few
    assert has_stages(predictor)
    stages = predict_stages(predictor, records, truth, "net")
    whole, _ = predict_records(predictor, records, truth, "net")
    assert len(stages) == 3
    for last, own in zip(stages[-1], whole):
        np.testing.assert_allclose(last.boxes, own.boxes, atol=1e-4)
        assert last.masks == own.masks


def test_an_image_that_is_gone_is_named(predictor, few):
    records, truth = few
    broken = [{**records[0], "file_name": "gone.png"}]
    with pytest.raises(UserError, match="cannot read image gone.png"):
        predict_records(predictor, broken, truth, "net")
