import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from d2ext.modeling.regions.boxes import pixel_boxes, to_continuous
from d2ext.modeling.regions.targets import align_masks, gt_bitmaps, pack_masks, resize_masks
from d2ext.utils.testing import random_batch

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

VECTORS = Path(__file__).resolve().parents[2] / "vectors"


def vector(project, name):
    entries = json.loads((VECTORS / f"{project}_vectors.json").read_text())["vectors"]
    (entry,) = [x for x in entries if x["id"] == name]
    return entry["inputs"], entry["expected"]


# ------------------------------------------------------------------------ detectron2's mask targets


def test_mask_targets_of_bitmaps_equal_detectron2s():
    generator = torch.Generator().manual_seed(0)
    masks = BitMasks(torch.rand(3, 40, 50, generator=generator) > 0.6)
    corners = torch.rand(8, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + 5 + 15 * torch.rand(8, 2, generator=generator)], dim=1)
    index = torch.randint(3, (8,), generator=generator)
    expected = masks[index].crop_and_resize(boxes, 14)
    assert torch.equal(align_masks(masks, index, boxes, 14), expected)
    assert 0 < expected.float().mean() < 1


def test_mask_targets_of_polygons_equal_detectron2s():
    masks = PolygonMasks([[np.array([0.0, 0, 10, 0, 10, 10])], [np.array([5.0, 5, 30, 5, 30, 30])]])
    boxes = torch.tensor([[4.0, 4, 31, 31], [0.0, 0, 10, 10], [2.0, 3, 25, 30]])
    index = torch.tensor([1, 0, 1])
    expected = masks[index].crop_and_resize(boxes, 14)
    assert torch.equal(align_masks(masks, index, boxes, 14), expected)
    assert expected.any()


# --------------------------------------------------------------------------- those of the releases


def target_by_opencv(mask, limit, box, size, threshold=0.4):
    """Cut, paste and resize one mask as the releases do; boxes are first and last pixels."""
    (x1, y1, x2, y2), (gx1, gy1, gx2, gy2) = box, limit
    canvas = np.zeros((y2 - y1 + 1, x2 - x1 + 1), np.float32)
    left, top, right, bottom = max(x1, gx1), max(y1, gy1), min(x2, gx2), min(y2, gy2)
    if left <= right and top <= bottom:
        inside = mask[top : bottom + 1, left : right + 1]
        canvas[top - y1 : bottom + 1 - y1, left - x1 : right + 1 - x1] = inside
    resized = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_LINEAR)
    # OpenCV rounds its weights: values of nearly 0.4 may fall on either side.
    return resized >= threshold, np.abs(resized - threshold) > 1e-3


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("size", [6, 9, 21])
def test_targets_equal_a_crop_resized_by_opencv(size, limited):
    instances = random_batch(1, num_objects=4)[0]["instances"]
    masks, gts = instances.gt_masks.tensor, instances.gt_masks.get_bounding_boxes().tensor
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(4).repeat(10)
    boxes = gts[index] + 6 * torch.randn(40, 4, generator=generator)
    boxes = pixel_boxes(torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], 1))
    limits = pixel_boxes(gts[index]) if limited else torch.tensor([[0, 0, 95, 63]]).repeat(40, 1)
    ours = resize_masks(masks, index, boxes, size, 0.4, limits if limited else None)
    sure_pixels = 0
    for row, (box, limit) in enumerate(zip(boxes.tolist(), limits.tolist())):
        expected, sure = target_by_opencv(masks[index[row]].float().numpy(), limit, box, size)
        assert (ours[row].numpy() == expected)[sure].all()
        sure_pixels += sure.sum()
    assert sure_pixels > 0.9 * ours.numel()
    assert 0.1 < ours.float().mean() < 0.9


def test_targets_of_the_release_of_mnc():
    inputs, expected = vector("mnc", "MT1")
    x1, y1, x2, y2 = inputs["gt_box"]
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, y1 : y2 + 1, x1 : x2 + 1] = torch.tensor(inputs["gt_mask"], dtype=torch.bool)
    row, box = torch.tensor([0]), torch.tensor([inputs["roi"]])
    for size in inputs["M"]:
        found = resize_masks(mask, row, box, size, 0.4)
        assert found[0].int().tolist() == expected[f"target_M{size}"]
    # The threshold lies between neighbouring values of the resized mask.
    values = sorted({v for row in expected["resized_M3"] for v in row if 0 < v < 1})
    assert resize_masks(mask, row, box, 3, values[0] - 1e-3).sum() == 5
    assert resize_masks(mask, row, box, 3, values[0] + 1e-3).sum() == 4


def test_targets_of_the_release_of_fcis():
    inputs, expected = vector("fcis", "mask_13_targets")
    boxes = pixel_boxes(to_continuous(torch.tensor(inputs["rois"], dtype=torch.float32)))
    targets = resize_masks(
        torch.tensor(inputs["gt_mask"])[None],
        torch.zeros(len(boxes), dtype=torch.int64),
        boxes,
        inputs["mask_size"],
        inputs["thresh"],
        limits=torch.tensor([inputs["gt_box"]]).repeat(len(boxes), 1),
    )
    assert targets.int().tolist() == expected["targets"]


def test_a_mask_ends_at_its_limits():
    masks = torch.ones(1, 20, 20, dtype=torch.bool)
    index, box = torch.tensor([0]), torch.tensor([[0, 0, 19, 19]])
    limits = pixel_boxes(torch.tensor([[5.0, 5, 15, 15]]))
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[5:15, 5:15] = True
    assert torch.equal(resize_masks(masks, index, box, 20, 0.4, limits)[0], expected)


def test_regions_that_reach_out_of_the_image_are_background_there():
    masks = torch.ones(1, 10, 10, dtype=torch.bool)
    box = torch.tensor([[-5, 0, 14, 9]])
    targets = resize_masks(masks, torch.tensor([0]), box, 20, 0.4)
    assert targets[0].all(dim=0).tolist() == [False] * 5 + [True] * 10 + [False] * 5


def test_no_regions_give_no_targets():
    none = torch.zeros(0, dtype=torch.int64)
    masks = torch.zeros(0, 10, 10, dtype=torch.bool)
    assert resize_masks(masks, none, none.reshape(0, 4), 21, 0.4).shape == (0, 21, 21)


def test_pixels_of_a_box_round_halves_to_even():
    boxes = torch.tensor([[0.5, 1.5, 4.5, 3.5], [2.4, 2.6, 2.9, 2.7]])
    assert pixel_boxes(boxes).tolist() == [[0, 2, 4, 2], [2, 3, 2, 3]]
    assert pixel_boxes(to_continuous(torch.tensor([[3.0, 4, 5, 9]]))).tolist() == [[3, 4, 5, 9]]


# ------------------------------------------------------------------------------- whole-image masks


def test_polygons_become_bitmaps():
    polygon = [np.array([2.0, 2.0, 8.0, 2.0, 8.0, 6.0, 2.0, 6.0])]
    target = Instances((10, 12), gt_boxes=Boxes([[2, 2, 8, 6]]), gt_classes=torch.tensor([0]))
    target.gt_masks = PolygonMasks([polygon])
    bitmap = gt_bitmaps(target)
    assert bitmap.shape == (1, 10, 12) and bitmap.sum() == 24 and bitmap[0, 2:6, 2:8].all()


def test_images_without_objects_have_no_bitmaps():
    target = Instances((10, 12), gt_boxes=Boxes([]), gt_classes=torch.zeros(0, dtype=torch.int64))
    assert gt_bitmaps(target).shape == (0, 10, 12)


def test_masks_of_images_of_several_sizes_are_resized_in_one_call():
    generator = torch.Generator().manual_seed(0)
    masks = [
        torch.rand(n, h, w, generator=generator) > 0.4
        for n, h, w in ((2, 20, 30), (0, 9, 9), (3, 40, 24))
    ]
    index = [torch.tensor([1, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([2, 0, 0])]
    # One reaches over the border of the smaller image.
    boxes = torch.tensor(
        [[3, 4, 18, 15], [20, 10, 35, 25], [0, 0, 9, 9], [5, 5, 30, 50], [1, 2, 3, 4]]
    )
    packed = pack_masks(masks)
    found = resize_masks(packed.masks, packed.rows(index), boxes, 7, 0.4)
    alone = [
        resize_masks(own, rows, b, 7, 0.4)
        for own, rows, b in zip(masks, index, boxes.split([2, 0, 3]))
    ]
    assert torch.equal(found, torch.cat(alone)) and found.any()
    assert pack_masks(packed) is packed
