"""The IoU that the head learns against plain loops over pixels."""

import pytest
import torch

from d2ext.errors import UserError
from mask_scoring import mask_iou_targets, share_inside

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

SIDE = 8  # of the predicted masks
SIZE = (24, 30)


def blob(generator):
    """A random union of rectangles, bool (H, W)."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    for _ in range(3):
        y, x = (int(torch.randint(n - 6, (), generator=generator)) for n in SIZE)
        h, w = (int(n) for n in torch.randint(2, 9, (2,), generator=generator))
        mask[y : y + h, x : x + w] = True
    return mask


def regions_of(objects, boxes):
    return Instances(SIZE, proposal_boxes=Boxes(boxes), gt_masks=BitMasks(objects))


def iou_by_pixel(found, thing, x, y):
    """IoU of a mask of one value per pixel, its corner at (x, y), with an object in the image."""
    both = either = 0
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            inside = 0 <= row - y < SIDE and 0 <= column - x < SIDE
            a = inside and bool(found[row - y, column - x] > 0.5)
            b = bool(thing[row, column])
            both += a and b
            either += a or b
    return both / either if either else 0.0


def test_iou_is_that_with_the_whole_object_in_the_image():
    """Boxes of one pixel per value of the mask, so that nothing is resampled."""
    generator = torch.Generator().manual_seed(0)
    images, masks, expected = [], [], []
    for _ in range(2):
        objects = torch.stack([blob(generator) for _ in range(12)])
        corners = torch.stack([torch.randint(n - SIDE, (12,), generator=generator) for n in SIZE])
        boxes = torch.stack([corners[1], corners[0], corners[1] + SIDE, corners[0] + SIDE], 1)
        crops = regions_of(objects, boxes.float()).gt_masks.crop_and_resize(boxes.float(), SIDE)
        found = (torch.rand(12, SIDE, SIDE, generator=generator) + crops) / 2
        images.append(regions_of(objects, boxes.float()))
        masks.append(found)
        for i in range(12):
            expected.append(iou_by_pixel(found[i], objects[i], *boxes[i, :2].tolist()))
    targets = mask_iou_targets(torch.cat(masks)[:, None], images)
    torch.testing.assert_close(targets, torch.tensor(expected))
    assert 0 in expected and max(expected) > 0.2


def test_a_perfect_mask_of_half_an_object_is_worth_a_half():
    objects = torch.zeros(1, *SIZE, dtype=torch.bool)
    objects[0, 4:12, 2:18] = True
    box = torch.tensor([[2.0, 4.0, 10.0, 12.0]])
    assert mask_iou_targets(torch.ones(1, 1, SIDE, SIDE), [regions_of(objects, box)]).item() == 0.5


def test_share_counts_the_pixels_that_a_box_cuts_in_part():
    generator = torch.Generator().manual_seed(1)
    objects = torch.stack([blob(generator) for _ in range(6)])
    boxes = 20 * torch.rand(6, 2, generator=generator) - 4
    boxes = torch.cat([boxes, boxes + 15 * torch.rand(6, 2, generator=generator)], 1)
    fine = 0.05  # by points at this distance
    for share, mask, (x0, y0, x1, y1) in zip(share_inside(objects, boxes), objects, boxes.tolist()):
        ys = torch.arange(0.025, SIZE[0], fine)
        xs = torch.arange(0.025, SIZE[1], fine)
        inside = ((ys > y0) & (ys < y1))[:, None] & ((xs > x0) & (xs < x1))[None]
        points = mask[ys.long()][:, xs.long()]
        expected = (points & inside).sum() / points.sum()
        assert share.item() == pytest.approx(expected.item(), abs=0.02)


def test_nothing_to_compare_is_zero_and_no_regions_are_fine():
    empty = torch.zeros(2, *SIZE, dtype=torch.bool)
    boxes = torch.tensor([[1.0, 1, 9, 9], [2, 2, 20, 20]])
    assert share_inside(empty, boxes).tolist() == [0, 0]
    masks = torch.stack([torch.zeros(1, SIDE, SIDE), torch.ones(1, SIDE, SIDE)])
    assert mask_iou_targets(masks, [regions_of(empty, boxes)]).tolist() == [0, 0]
    none = regions_of(empty[:0], boxes[:0])
    assert mask_iou_targets(masks[:0], [none, none]).shape == (0,)


def test_polygons_are_refused_with_the_setting():
    polygons = PolygonMasks([[[1.0, 1, 9, 1, 9, 9]]])
    regions = Instances(SIZE, proposal_boxes=Boxes(torch.ones(1, 4)), gt_masks=polygons)
    with pytest.raises(UserError, match="INPUT.MASK_FORMAT=bitmask"):
        mask_iou_targets(torch.ones(1, 1, SIDE, SIDE), [regions])
