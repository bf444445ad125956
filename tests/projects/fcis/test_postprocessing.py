"""From regions of the network input to masks of the image."""

import cv2
import numpy as np
import pytest
import torch

from d2ext.ops import MaskVoting
from d2ext.projects.fcis.postprocessing import (
    paste_instances,
    place_masks,
    scale_boxes,
    vote_instances,
)

from detectron2.structures import Boxes, Instances


def paste_by_opencv(mask, box, size, threshold):
    x1, y1, x2, y2 = np.round(box).astype(int)
    image = np.zeros(size, bool)
    inside = cv2.resize(mask, (x2 - x1 + 1, y2 - y1 + 1), interpolation=cv2.INTER_LINEAR)
    image[y1 : y2 + 1, x1 : x2 + 1] = inside >= threshold
    return image


def test_masks_are_pasted_as_opencv_resizes_them():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(30, 5, 5, generator=generator)
    low = torch.randint(0, 40, (30, 2), generator=generator)
    extent = torch.randint(0, 20, (30, 2), generator=generator)
    boxes = torch.cat([low, low + extent], dim=1).float() + 0.3
    result = place_masks(Instances((64, 60)), masks, boxes, 0.4)
    for mask, box, ours in zip(masks, boxes, result.pred_masks):
        expected = paste_by_opencv(mask.numpy(), box.numpy(), (64, 60), 0.4)
        assert (ours.numpy() != expected).sum() <= 1  # OpenCV rounds its weights


def test_a_full_mask_fills_its_box_up_to_the_border_and_no_more():
    box = torch.tensor([[3.0, 2.0, 12.0, 17.0]])
    result = place_masks(Instances((20, 16)), torch.full((1, 21, 21), 0.41), box, 0.4)
    pasted = result.pred_masks[0]
    assert result.pred_boxes.tensor.tolist() == [[3, 2, 13, 18]]
    expected = torch.zeros(20, 16, dtype=torch.bool)
    expected[2:18, 3:13] = True
    assert torch.equal(pasted, expected)


def test_pixel_indices_are_divided_by_the_scale_and_clipped():
    boxes = torch.tensor([[0.0, 3, 30, 60], [90, 0, 99.5, 99]])
    scaled = scale_boxes(boxes, (100, 100), (50, 25))
    assert scaled.tolist() == [[0, 1.5, 7.5, 30], [22.5, 0, 24, 49]]


def test_regions_without_voting_keep_their_own_masks():
    found = Instances((40, 40))
    found.pred_boxes = Boxes(torch.tensor([[4.0, 4, 20, 20], [0, 0, 40, 40]]))
    found.pixel_boxes = torch.tensor([[4.0, 4, 19, 19], [0, 0, 39, 39]])
    found.scores = torch.tensor([0.9, 0.8])
    found.pred_classes = torch.tensor([1, 0])
    found.pred_masks = torch.ones(2, 1, 7, 7)
    found.pred_masks[1] = 0.3
    result = paste_instances(found, (20, 20), 0.4)
    assert result.pred_boxes.tensor.tolist() == [[2, 2, 11, 11], [0, 0, 20, 20]]
    assert result.pred_masks[0].nonzero().amin(0).tolist() == [2, 2]
    assert result.pred_masks[0].nonzero().amax(0).tolist() == [10, 10]
    assert not result.pred_masks[1].any()
    assert torch.equal(result.scores, found.scores) and not result.has("pixel_boxes")
    assert torch.equal(result.pred_classes, found.pred_classes)


@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_regions_gives_instances_of_the_right_shapes(count):
    generator = torch.Generator().manual_seed(0)
    low = 40 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([low, low + 4 + 15 * torch.rand(count, 2, generator=generator)], dim=1)
    probs = torch.rand(count, 4, generator=generator)
    masks = torch.ones(count, 9, 9)
    found = vote_instances(boxes, probs, masks, (64, 60), MaskVoting(max_per_image=100))
    assert len(found) <= 100 and (len(found) > 0) == (count > 0)
    assert found.pred_masks.shape == (len(found), 64, 60) and found.pred_masks.dtype == torch.bool
    assert found.pred_boxes.tensor.shape == (len(found), 4)
    assert found.scores.shape == found.pred_classes.shape == (len(found),)
    assert found.image_size == (64, 60)


def test_boxes_are_tight_around_the_masks():
    mask = torch.zeros(1, 4, 4)
    mask[:, 1:3, 1:3] = 1
    boxes = torch.tensor([[0.0, 0, 39, 39]])
    found = vote_instances(boxes, torch.tensor([[0.9]]), mask, (50, 50), MaskVoting())
    (box,) = found.pred_boxes.tensor.tolist()
    rows, columns = found.pred_masks[0].nonzero().unbind(1)
    assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert 8 < box[0] < 12 and 28 < box[2] < 32
