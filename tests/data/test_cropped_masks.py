"""Masks inside their boxes: decoding, drawing, whole bitmaps, labels."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from d2ext.data.cropped_masks import (
    CroppedMasks,
    bitmaps_to_hand_on,
    decode,
    draw_polygons,
    join,
    tensor_to_hand_on,
)

from detectron2.structures.masks import polygons_to_bitmask

HEIGHT, WIDTH = 13, 17


def some_masks():
    """Noise, nothing, everything, single pixels, and runs that go on in the next column."""
    draw = np.random.default_rng(0)
    masks = [draw.random((HEIGHT, WIDTH)) < share for share in (0.02, 0.3, 0.98)]
    masks += [np.zeros((HEIGHT, WIDTH), bool), np.ones((HEIGHT, WIDTH), bool)]
    for y, x in ((0, 0), (HEIGHT - 1, WIDTH - 1), (5, 6)):
        single = np.zeros((HEIGHT, WIDTH), bool)
        single[y, x] = True
        masks.append(single)
    wrapping = np.zeros((HEIGHT, WIDTH), bool)
    wrapping[HEIGHT - 1, 3] = wrapping[0, 4] = True
    return np.stack([*masks, wrapping, np.zeros((HEIGHT, WIDTH), bool)])


def encodings(masks):
    return [mask_util.encode(np.asfortranarray(m, np.uint8)) for m in masks]


def check(found, masks):
    np.testing.assert_array_equal(found.bitmaps().numpy(), masks)
    assert found.bitmaps().dtype == torch.bool
    np.testing.assert_array_equal(found.areas, masks.sum((1, 2)))
    for mask, box, crop in zip(masks, found.boxes.tolist(), found.crops):
        y, x = np.nonzero(mask)
        tight = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0]
        assert box == tight and crop.shape == (box[3] - box[1], box[2] - box[0])


def test_run_length_encodings_are_decoded_inside_their_boxes():
    masks = some_masks()
    check(decode(encodings(masks), HEIGHT, WIDTH), masks)


@pytest.mark.parametrize("form", ["text", "list", "missing"])
def test_all_forms_of_an_encoding_are_read(form):
    mask = some_masks()[1]
    (rle,) = encodings(mask[None])
    if form == "text":
        rle = {**rle, "counts": rle["counts"].decode()}
    if form == "list":
        flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
        edges = np.flatnonzero(np.diff(flat))
        lengths = np.diff(np.concatenate([[0], edges, [mask.size]]))
        rle = {"size": [HEIGHT, WIDTH], "counts": lengths.tolist()}
    if form == "missing":
        rle, mask = None, np.zeros_like(mask)
    check(decode([rle], HEIGHT, WIDTH), mask[None])
    assert len(decode([], HEIGHT, WIDTH)) == 0


def test_polygons_are_drawn_as_by_detectron2():
    draw = np.random.default_rng(1)
    objects = [
        [draw.uniform(-3, 20, 2 * points) for points in draw.integers(3, 7, parts)]
        for parts in (1, 3, 2, 1, 0, 1)
    ]
    objects.append([np.array([50.0, 50, 60, 50, 60, 60])])  # outside
    expected = np.stack([polygons_to_bitmask(one, HEIGHT, WIDTH) for one in objects])
    assert expected.any((1, 2)).tolist() == [True] * 4 + [False, True, False]
    check(draw_polygons(objects, HEIGHT, WIDTH), expected)


def test_masks_are_cut_to_their_boxes():
    masks = some_masks()
    crops = [m.view(np.uint8) for m in masks]
    check(CroppedMasks.around((HEIGHT, WIDTH), crops), masks)
    shifted = np.zeros_like(masks)
    shifted[:, 2:, 3:] = masks[:, :-2, :-3]
    parts = [np.ascontiguousarray(c[:-2, :-3]) for c in crops]
    check(CroppedMasks.around((HEIGHT, WIDTH), parts, [(3, 2)] * len(parts)), shifted)


def test_masks_are_chosen_and_joined():
    masks = some_masks()
    found = decode(encodings(masks), HEIGHT, WIDTH)
    keep = np.arange(len(masks)) % 2 == 1
    check(found[keep], masks[keep])
    check(found[np.array([4, 0, 2])], masks[[4, 0, 2]])
    odd, even = np.flatnonzero(keep), np.flatnonzero(~keep)
    check(join([found[odd], found[even]], [*odd, *even]), masks)


def test_later_masks_are_painted_over_earlier_ones():
    masks = some_masks()
    labels, expected = (np.full((HEIGHT, WIDTH), 99, np.uint8) for _ in range(2))
    decode(encodings(masks), HEIGHT, WIDTH).paint(labels, range(len(masks)))
    for value, mask in enumerate(masks):
        expected[mask] = value
    np.testing.assert_array_equal(labels, expected)


def test_loading_processes_share_what_they_hand_on(monkeypatch):
    for worker in (None, "a loading process"):
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda worker=worker: worker)
        labels, bitmaps = tensor_to_hand_on((3, 4), torch.int64), bitmaps_to_hand_on((2, 3, 4))
        assert labels.is_shared() == bitmaps.is_shared() == (worker is not None)
        assert (labels.shape, labels.dtype) == ((3, 4), torch.int64)
        assert bitmaps.dtype == torch.bool and not bitmaps.any()
        bitmaps[1, 2, 3] = True
        labels.fill_(7)
        assert bitmaps.sum() == 1 and labels.sum() == 84
        assert bitmaps_to_hand_on((0, 3, 4)).shape == (0, 3, 4)
