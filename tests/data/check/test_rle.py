"""Validation of run-length encodings against masks that pycocotools encoded."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.data.check.rle import compressed_run_sums, list_run_sums


def _random_masks(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(1, 200, 2)
        density = (0.0, 1.0, 0.5, 0.02)[i % 4]
        mask = rng.random((height, width)) < density
        if i % 4 == 3:  # long runs: numbers of several characters
            mask = np.repeat(mask, 5, axis=0)
        yield mask


def test_runs_of_encoded_masks_add_up_to_their_pixels():
    masks = list(_random_masks(200))
    counts = [mask_util.encode(np.asfortranarray(m, np.uint8))["counts"] for m in masks]
    total, area = compressed_run_sums(counts)
    assert total.tolist() == [m.size for m in masks]
    assert area.tolist() == [m.sum() for m in masks]


@pytest.mark.parametrize("bad", [b"zzz", b"\xff\xff", b"0d1", b"P", b"0" + b"P" * 20 + b"0", b"!"])
def test_an_invalid_encoding_is_marked_without_affecting_its_neighbours(bad):
    good = mask_util.encode(np.asfortranarray(np.eye(7, 9, dtype=np.uint8)))["counts"]
    total, area = compressed_run_sums([good, bad, good])
    assert total[0] == total[2] == 63 and area[0] == area[2] == 7
    assert total[1] != 20


def test_empty_inputs():
    assert compressed_run_sums([]).total.shape == (0,)
    good = mask_util.encode(np.ones((4, 5), np.uint8, order="F"))["counts"]
    assert compressed_run_sums([b"", good, b""]).total.tolist() == [0, 20, 0]
    assert compressed_run_sums([b""]).total.tolist() == [0]


def test_uncompressed_runs():
    assert list_run_sums([0, 20]) == (20, 20)
    assert list_run_sums([3, 4, 5, 8]) == (20, 12)
    for bad in ([0, -3, 23], [1.5, 18.5], ["a"], [True, 19]):
        assert list_run_sums(bad)[0] == -1
