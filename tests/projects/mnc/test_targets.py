import numpy as np
import pytest
import torch

from mnc.targets import gt_bitmaps, mask_ious, mask_targets, pixel_boxes

from detectron2.structures import Boxes, Instances, PolygonMasks

cv2 = pytest.importorskip("cv2")


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


def test_pixels_of_a_box_round_halves_to_even():
    boxes = torch.tensor([[0.5, 1.5, 4.5, 3.5], [2.4, 2.6, 2.9, 2.7]])
    assert pixel_boxes(boxes).tolist() == [[0, 2, 4, 2], [2, 3, 2, 3]]


def test_mask_targets_equal_those_of_opencv(masks, boxes):
    gt_index = torch.arange(len(boxes)) % 3
    found = mask_targets(masks, gt_index, boxes, 9)
    for row, (x1, y1, x2, y2) in enumerate(pixel_boxes(boxes).tolist()):
        canvas = np.zeros((y2 - y1 + 1, x2 - x1 + 1), np.float32)
        for y in range(max(y1, 0), min(y2 + 1, 30)):
            for x in range(max(x1, 0), min(x2 + 1, 40)):
                canvas[y - y1, x - x1] = masks[gt_index[row], y, x]
        expected = cv2.resize(canvas, (9, 9), interpolation=cv2.INTER_LINEAR)
        sure = np.abs(expected - 0.4) > 1e-3
        assert (found[row].numpy() == (expected >= 0.4))[sure].all()
        assert sure.mean() > 0.9


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


def test_polygons_become_bitmaps():
    polygon = [np.array([2.0, 2.0, 8.0, 2.0, 8.0, 6.0, 2.0, 6.0])]
    target = Instances((10, 12), gt_boxes=Boxes([[2, 2, 8, 6]]), gt_classes=torch.tensor([0]))
    target.gt_masks = PolygonMasks([polygon])
    bitmap = gt_bitmaps(target)
    assert bitmap.shape == (1, 10, 12) and bitmap.sum() == 24 and bitmap[0, 2:6, 2:8].all()


def test_images_without_objects_have_no_bitmaps():
    target = Instances((10, 12), gt_boxes=Boxes([]), gt_classes=torch.zeros(0, dtype=torch.int64))
    assert gt_bitmaps(target).shape == (0, 10, 12)
    nothing = torch.zeros(0, 4)
    index = torch.zeros(0, dtype=torch.int64)
    assert mask_targets(gt_bitmaps(target), index, nothing, 5).shape == (0, 5, 5)
    assert mask_ious(torch.zeros(0, 5, 5), nothing, gt_bitmaps(target), index).shape == (0,)
