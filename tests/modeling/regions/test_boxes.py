import pytest
import torch

from d2ext.modeling.regions.boxes import (
    boxes_inside,
    clip_boxes,
    sizes_of_rows,
    to_continuous,
    to_inclusive,
)

from detectron2.structures import Boxes, pairwise_iou


def test_conversions_undo_each_other_and_move_the_end_only():
    pixels = torch.tensor([[3.0, 4.0, 5.0, 9.0]])
    boxes = to_continuous(pixels)
    assert boxes.tolist() == [[3.0, 4.0, 6.0, 10.0]]
    assert torch.equal(to_inclusive(boxes), pixels)
    assert to_continuous(torch.zeros(0, 4)).shape == (0, 4)


def test_continuous_areas_and_overlaps_are_those_of_whole_pixels():
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 20, (2, 6, 2), generator=generator)
    high = low + torch.randint(0, 9, (2, 6, 2), generator=generator)
    pixels = torch.cat([low, high], dim=2)

    def members(box):
        x1, y1, x2, y2 = box.tolist()
        return {(x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1)}

    first, second = (Boxes(to_continuous(p.float())) for p in pixels)
    iou = pairwise_iou(first, second)
    for i, a in enumerate(pixels[0]):
        assert first.area()[i] == len(members(a))
        for j, b in enumerate(pixels[1]):
            common, union = members(a) & members(b), members(a) | members(b)
            assert iou[i, j].item() == pytest.approx(len(common) / len(union), abs=1e-6)


def test_clipping_moves_corners_into_the_image():
    boxes = torch.tensor([[-3.0, 2.0, 8.0, 12.0], [1.0, 1.0, 2.0, 2.0], [20.0, -9.0, 25.0, -4.0]])
    assert clip_boxes(boxes, (10, 6)).tolist() == [[0, 2, 6, 10], [1, 1, 2, 2], [6, 0, 6, 0]]
    # A box outside keeps the pixel nearest to it: the last column of the first row.
    assert clip_boxes(boxes, (10, 6), whole_pixel=True)[2].tolist() == [5, 0, 6, 1]


def test_whole_pixel_clipping_is_that_of_inclusive_corners():
    generator = torch.Generator().manual_seed(0)
    pixels = 30 * torch.rand(50, 4, generator=generator) - 10
    pixels[:, 2:] = pixels[:, :2] + pixels[:, 2:].abs()
    limits = torch.tensor([11.0, 7.0, 11.0, 7.0])
    expected = torch.minimum(pixels.clamp(min=0), limits)
    ours = clip_boxes(to_continuous(pixels), (8, 12), whole_pixel=True)
    torch.testing.assert_close(to_inclusive(ours), expected)


def test_gradient_reaches_the_corners_inside_the_image_only():
    boxes = torch.tensor([[-3.0, 2.0, 4.0, 12.0]], requires_grad=True)
    clip_boxes(boxes, (10, 6)).sum().backward()
    assert boxes.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_boxes_of_several_images_are_clipped_each_to_its_own():
    boxes = torch.tensor([[-2.0, 3, 8, 12], [1, 1, 6, 10], [-2, 3, 8, 12]])
    sizes, counts = [(10, 6), (50, 60)], [2, 1]
    rows = sizes_of_rows(sizes, counts)
    for whole_pixel in (False, True):
        alone = [
            clip_boxes(own, size, whole_pixel=whole_pixel)
            for own, size in zip(boxes.split(counts), sizes)
        ]
        assert torch.equal(clip_boxes(boxes, rows, whole_pixel=whole_pixel), torch.cat(alone))
    assert boxes_inside(boxes, rows).tolist() == [False, True, False]
