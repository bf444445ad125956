"""Arranging panels, and placing labels."""

import numpy as np
import pytest

from d2ext.visualization import panel_scale, picture_stems, side_by_side
from d2ext.visualization.text import place_labels, text_size


def plain(height, width, value):
    return np.full((height, width, 3), value, np.uint8)


def rows_and_columns(sheet, value):
    """First and last row and column that hold a pixel of this grey value."""
    ys, xs = np.nonzero((sheet == value).all(axis=2))
    return ys.min(), ys.max(), xs.min(), xs.max()


def test_panels_are_whole_and_in_reading_order():
    sheet = side_by_side([plain(30, 50, v) for v in (10, 20, 30)], ["a", "b", "c"], columns=2)
    places = [rows_and_columns(sheet, v) for v in (10, 20, 30)]
    for top, bottom, left, right in places:
        assert (bottom - top + 1, right - left + 1) == (30, 50)
    (top_a, bottom_a, _, right_a), (top_b, _, left_b, _), (top_c, _, left_c, _) = places
    assert top_a == top_b and right_a < left_b
    assert bottom_a < top_c and left_c == places[0][2]


def test_panels_of_different_sizes_do_not_touch():
    sheet = side_by_side([plain(20, 80, 10), plain(60, 30, 20)])
    assert rows_and_columns(sheet, 10)[3] < rows_and_columns(sheet, 20)[2]
    assert sheet.dtype == np.uint8


def test_long_title_stays_above_its_own_panel():
    sheet = side_by_side([plain(40, 60, 10), plain(40, 60, 10)], ["a very long title" * 5, ""])
    _, _, _, right = rows_and_columns(sheet[:, : sheet.shape[1] // 2], 10)
    header = sheet[: rows_and_columns(sheet, 10)[0]]
    assert (header[:, : right + 1] != 255).any()
    assert (header[:, right + 2 :] == 255).all()


def test_wrong_number_of_titles_is_refused():
    with pytest.raises(ValueError, match="2 panels, but 1 titles"):
        side_by_side([plain(4, 4, 0)] * 2, ["one"])
    with pytest.raises(ValueError, match="no panels"):
        side_by_side([])


def test_wider_text_measures_wider():
    assert text_size("rectangle 98%", 14)[0] > text_size("bar 98%", 14)[0] > 0
    assert text_size("bar", 28)[1] == 2 * text_size("bar", 14)[1]


def test_labels_of_crowded_boxes_do_not_cover_each_other():
    boxes = np.array([[50, 50, 90, 90], [52, 51, 92, 90], [49, 50, 91, 92]], float)
    corners = place_labels(boxes, [(30, 10)] * 3, 200, 200)
    for i, (x, y) in enumerate(corners):
        for u, v in corners[:i]:
            assert abs(x - u) >= 30 or abs(y - v) >= 10


def test_labels_stay_inside_the_picture():
    boxes = np.array([[0, 0, 20, 20], [180, 180, 200, 200], [-5, 190, 3, 210]], float)
    for x, y in place_labels(boxes, [(60, 12)] * 3, 200, 200):
        assert 0 <= x <= 140 and 0 <= y <= 188


def test_images_of_one_name_have_pictures_of_their_own():
    paths = ["a/1.jpg", "b/1.jpg", "a/1_2.jpg", "a/2.png", "a/2.jpg", "C/A.jpg", "c/a.jpg"]
    names = picture_stems(paths)
    assert names[:5] == ["1", "1_2", "1_2_2", "2", "2_2"]
    assert len({name.lower() for name in names}) == len(paths)


def test_photographs_are_made_smaller_and_small_images_enlarged():
    assert panel_scale(3000, 4000) == 1200 / 4000
    assert panel_scale(64, 128) == 4
