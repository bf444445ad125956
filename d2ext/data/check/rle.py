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
    runs, owner, place, bad = compressed_runs(counts)
    total, area = np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64)
    np.add.at(total, owner, runs)
    np.add.at(area, owner[place % 2 == 1], runs[place % 2 == 1])
    bad[owner[runs < 0]] = True
    total[bad] = -1
    return RunSums(total, area)


class Runs(NamedTuple):
    """The runs of all masks, one after the other."""

    lengths: np.ndarray  # in pixels
    owner: np.ndarray  # index of the mask
    place: np.ndarray  # 0, 1, 2, ... within the mask; odd ones belong to the object
    bad: np.ndarray  # bool, one per mask: not a valid encoding


def compressed_runs(counts: Sequence[bytes]) -> Runs:
    """The lengths of runs in COCO's compressed encoding, see `compressed_run_sums`."""
    bad = np.zeros(len(counts), bool)
    if not counts:
        none = np.zeros(0, np.int64)
        return Runs(none, none, none, bad)
    lengths = np.array([len(c) for c in counts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    codes = np.frombuffer(b"".join(counts), np.uint8).astype(np.int64) - 48
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
    return _undo_differences(values, owner[starts], bad)


def _undo_differences(values, owner, bad) -> Runs:
    """From the fourth run of a mask on, `values` are differences to the run before the last."""
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
    return Runs(runs, owner, index, bad)


def list_run_sums(counts: list[int]) -> tuple:
    """The same (total, area) for one mask in the uncompressed encoding, a list of run lengths."""
    if not all(type(c) is int and c >= 0 for c in counts):
        return -1, 0
    return sum(counts), sum(counts[1::2])
