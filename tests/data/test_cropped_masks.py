"""Masks inside their boxes: decoding, drawing, whole bitmaps, labels."""

import copy
import pickle

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from d2ext.data.cropped_masks import (
    CroppedBitMasks,
    CroppedMasks,
    bitmaps_in_new_pages,
    decode,
    draw_polygons,
    join,
)

from detectron2.structures import BitMasks
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


def test_masks_are_handed_on_in_boxes_of_eight_pixels_a_byte():
    masks = some_masks()
    found = decode(encodings(masks), HEIGHT, WIDTH)
    check(pickle.loads(pickle.dumps(found)), masks)
    check(pickle.loads(pickle.dumps(found[np.zeros(len(masks), bool)])), masks[:0])
    large = CroppedMasks.around((500, 400), [np.ones((500, 400), np.uint8)])
    assert len(pickle.dumps(large)) < 500 * 400 / 8 + 1000


def test_bitmaps_on_a_device_are_the_same():
    masks, device = some_masks(), torch.device("cpu")  # by what draws on a GPU
    cropped = decode(encodings(masks), HEIGHT, WIDTH)
    assert torch.equal(cropped.bitmaps_on(device), torch.from_numpy(masks))
    none = cropped[np.zeros(len(masks), bool)]
    assert none.bitmaps_on(device).shape == (0, HEIGHT, WIDTH)


def test_bitmasks_are_those_of_detectron2_drawn_when_they_are_looked_at():
    masks = some_masks()
    cropped = decode(encodings(masks), HEIGHT, WIDTH)
    found, expected = CroppedBitMasks(cropped), BitMasks(torch.from_numpy(masks))
    assert len(found) == len(masks) and tuple(found.image_size) == (HEIGHT, WIDTH)
    found = copy.deepcopy(pickle.loads(pickle.dumps(found)))
    assert len(found) == len(masks) and "tensor" not in vars(found)
    assert torch.equal(found.to("cpu").tensor, expected.tensor)
    assert torch.equal(found.get_bounding_boxes().tensor, expected.get_bounding_boxes().tensor)
    assert torch.equal(found[2:4].tensor, expected[2:4].tensor)
    assert torch.equal(BitMasks.cat([found, found]).tensor, expected.tensor.repeat(2, 1, 1))
    assert found.device == torch.device("cpu") and len(list(found)) == len(masks)
    found.tensor[:] = True  # from now on, what was drawn counts
    assert pickle.loads(pickle.dumps(found)).tensor.all() and len(found) == len(masks)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        found.nothing  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bitmasks_are_drawn_on_a_gpu():
    masks = some_masks()
    drawn = CroppedBitMasks(decode(encodings(masks), HEIGHT, WIDTH)).to(device="cuda")
    assert drawn.tensor.is_cuda
    assert torch.equal(drawn.tensor.cpu(), torch.from_numpy(masks))


def test_bitmaps_in_new_pages_are_false():
    bitmaps = bitmaps_in_new_pages((2, 3, 4))
    assert bitmaps.dtype == torch.bool and not bitmaps.any()
    bitmaps[1, 2, 3] = True
    assert bitmaps.sum() == 1
    assert bitmaps_in_new_pages((0, 3, 4)).shape == (0, 3, 4)
