"""Validation of COCO run-length encoded masks, without decoding them to pixels.

pycocotools trusts its input: where the runs do not add up to the size of the mask, it returns
uninitialised memory as a mask. Thousands of masks are therefore checked here at once, in numpy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MAX_CHARACTERS = 12  # of one number: 60 bits


class RunSums(NamedTuple):
    """Per mask: number of pixels in all runs (-1: not a valid encoding), and in the object."""

    total: np.ndarray
    area: np.ndarray


def compressed_run_sums(counts: Sequence[bytes]) -> RunSums:
    """Lengths of the runs of masks in COCO's compressed encoding, added up.

    A run is a number in groups of five bits, lowest first, one per character from "0" upwards, 32
    marking that more follow; from the fourth run on it is the difference to the run before the
    last. Background and object alternate, background first.

    Args:
        counts: the `counts` entry of each mask.
    """
    if not counts:
        return RunSums(np.zeros(0, np.int64), np.zeros(0, np.int64))
    lengths = np.array([len(c) for c in counts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    codes = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64) - 48
    bad = np.zeros(len(counts), bool)
    owner = np.repeat(np.arange(len(counts)), lengths)
    bad[owner[(codes < 0) | (codes > 63)]] = True
    more = (codes & 32) != 0
    last = offsets[1:][lengths > 0] - 1
    bad[owner[last[more[last]]]] = True  # ends within a number
    ends_number = ~more
    ends_number[last] = True

    starts = np.flatnonzero(np.concatenate([[True], ends_number[:-1]])) if len(codes) else last
    sizes = np.diff(np.append(starts, len(codes)))
    place = np.arange(len(codes)) - np.repeat(starts, sizes)
    bad[owner[place >= _MAX_CHARACTERS]] = True
    place = np.minimum(place, _MAX_CHARACTERS - 1)
    values = np.add.reduceat((codes & 31) << (5 * place), starts) if len(starts) else starts
    final = starts + sizes - 1
    values = values - np.where(codes[final] & 16, 1 << (5 * (place[final] + 1)), 0)
    return _add_up(values, owner[starts], bad)


def _add_up(values, owner, bad) -> RunSums:
    """Undo the differences within each mask and add up its runs."""
    masks = len(bad)
    first = np.searchsorted(owner, np.arange(masks))
    index = np.arange(len(values)) - first[owner]
    runs = values.copy()
    for chain in ((index > 0) & (index % 2 == 1), (index > 0) & (index % 2 == 0)):
        part, mask = values[chain], owner[chain]
        sums = np.cumsum(part)
        begin = np.searchsorted(mask, np.arange(masks))
        before = np.concatenate([[0], sums])[begin]
        runs[chain] = sums - before[mask]
    bad[owner[runs < 0]] = True
    total, area = np.zeros(masks, np.int64), np.zeros(masks, np.int64)
    np.add.at(total, owner, runs)
    np.add.at(area, owner[index % 2 == 1], runs[index % 2 == 1])
    total[bad] = -1
    return RunSums(total, area)


def list_run_sums(counts: list[int]) -> tuple:
    """The same (total, area) for one mask in the uncompressed encoding, a list of run lengths."""
    if not all(type(c) is int and c >= 0 for c in counts):
        return -1, 0
    return sum(counts), sum(counts[1::2])
