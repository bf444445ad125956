import json
from pathlib import Path

import pytest
import torch

from detectron2.structures import BitMasks, Boxes, Instances

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "mnc_vectors.json"


@pytest.fixture(scope="session")
def vectors():
    return {entry["id"]: entry for entry in json.loads(VECTORS.read_text())["vectors"]}


@pytest.fixture
def ground_truth():
    """`ground_truth(boxes, classes, size)`: Instances with filled boxes as masks."""

    def make(boxes, classes, size=(40, 60)):
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = True
        return Instances(
            size,
            gt_boxes=Boxes(boxes),
            gt_classes=torch.tensor(classes, dtype=torch.int64),
            gt_masks=BitMasks(masks),
        )

    return make
