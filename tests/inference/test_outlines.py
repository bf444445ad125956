"""Polygons of masks give the masks again, as pycocotools draws them."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.inference.outlines import outlines, single_outline


def masks(count=60):
    """Noise, which has holes in parts in holes, and smooth forms, which reach over the border."""
    rng = np.random.default_rng(3)
    for number in range(count):
        height, width = rng.integers(1, 40, 2)
        values = rng.random((height, width))
        if number % 3:
            values = cv2.GaussianBlur(values, (0, 0), 1.5)
        yield values > np.quantile(values, rng.random())


def drawn(polygons, shape):
    if not polygons:
        return np.zeros(shape, bool)
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *shape))).astype(bool)


def test_polygons_cover_the_pixels_of_the_mask_and_no_others():
    for mask in masks():
        np.testing.assert_array_equal(drawn(outlines(mask), mask.shape), mask)


def test_one_polygon_covers_all_parts_and_leaves_out_the_holes():
    for mask in masks():
        polygon = single_outline(mask)
        np.testing.assert_array_equal(drawn([polygon] if polygon else [], mask.shape), mask)


def test_corners_lie_on_the_edges_of_pixels_and_straight_edges_have_no_others():
    mask = np.zeros((8, 9), bool)
    mask[2:5, 3:8] = True
    (polygon,) = outlines(mask)
    corners = {tuple(p) for p in np.reshape(polygon, (-1, 2)).tolist()}
    assert len(polygon) == 8 and corners == {(3, 2), (8, 2), (8, 5), (3, 5)}


def test_parts_have_a_polygon_each_and_an_empty_mask_has_none():
    mask = np.zeros((5, 9), bool)
    mask[1:3, 1:3] = mask[1:3, 5:7] = True
    assert len(outlines(mask)) == 2
    assert outlines(~mask & mask) == [] == single_outline(mask[:0])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_a_line_of_pixels_is_a_rectangle(size):
    (polygon,) = outlines(np.ones(size, bool))
    assert len(polygon) == 8 and max(polygon) == max(size)
