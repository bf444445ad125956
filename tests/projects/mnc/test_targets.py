import cv2
import numpy as np
import pytest
import torch

from d2ext.modeling.regions.boxes import pixel_boxes
from d2ext.projects.mnc.targets import mask_ious


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    blobs = torch.rand(3, 1, 6, 8, generator=generator)
    return torch.nn.functional.interpolate(blobs, (30, 40), mode="bilinear")[:, 0] > 0.5


@pytest.fixture
def boxes():
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(25, 2, generator=generator) * torch.tensor([35.0, 25.0]) - 2
    return torch.cat([low, low + 0.5 + 20 * torch.rand(25, 2, generator=generator)], dim=1)


def test_mask_ious_count_what_lies_outside_the_box(masks, boxes):
    generator = torch.Generator().manual_seed(2)
    predicted = torch.rand(len(boxes), 7, 7, generator=generator)
    gt_index = torch.arange(len(boxes)) % 3
    found = mask_ious(predicted, boxes, masks, gt_index)
    for row, (x1, y1, x2, y2) in enumerate(pixel_boxes(boxes).tolist()):
        resized = cv2.resize(
            predicted[row].numpy(), (x2 - x1 + 1, y2 - y1 + 1), interpolation=cv2.INTER_LINEAR
        )
        # A canvas with room for boxes that reach over the border.
        drawn = np.zeros((90, 90), bool)
        drawn[y1 + 30 : y2 + 31, x1 + 30 : x2 + 31] = resized >= 0.4
        truth = np.zeros((90, 90), bool)
        truth[30:60, 30:70] = masks[gt_index[row]].numpy()
        expected = (drawn & truth).sum() / (drawn | truth).sum()
        assert float(found[row]) == pytest.approx(expected, abs=0.02)
    assert found.max() > 0.1


def test_without_boxes_there_are_no_ious():
    none = torch.zeros(0, dtype=torch.int64)
    masks = torch.zeros(0, 10, 12, dtype=torch.bool)
    assert mask_ious(torch.zeros(0, 5, 5), torch.zeros(0, 4), masks, none).shape == (0,)
