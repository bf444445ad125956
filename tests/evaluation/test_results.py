"""COCO results become instances again."""

import json

import pytest
import torch

from d2ext.evaluation.results import to_instances

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances


@pytest.fixture
def instances():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 2:10, 3:9] = True
    masks[1, 5:20, 10:30] = True
    return Instances(
        (20, 30),
        pred_boxes=Boxes(torch.tensor([[3.0, 2.0, 9.0, 10.0], [10.5, 5.0, 30.0, 20.0]])),
        pred_classes=torch.tensor([1, 0]),
        scores=torch.tensor([0.9, 0.25]),
        pred_masks=masks,
    )


def test_results_written_by_the_evaluation_are_read_back_as_they_were(instances):
    results = instances_to_coco_json(instances, 5)
    category_ids = [30, 70]  # of classes 0 and 1
    for result in results:
        result["category_id"] = category_ids[result["category_id"]]
    read = to_instances(json.loads(json.dumps(results)), (20, 30), {30: 0, 70: 1})
    torch.testing.assert_close(read.pred_boxes.tensor, instances.pred_boxes.tensor)
    torch.testing.assert_close(read.scores, instances.scores)
    assert read.pred_classes.tolist() == [1, 0]
    assert torch.equal(read.pred_masks, instances.pred_masks)


def test_boxes_without_masks_and_images_without_results_are_fine():
    results = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    read = to_instances(results, (20, 30), {1: 0})
    assert read.pred_boxes.tensor.tolist() == [[1, 2, 4, 6]] and not read.has("pred_masks")
    assert len(to_instances([], (20, 30), {1: 0})) == 0
