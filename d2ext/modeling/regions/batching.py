"""Rows of several images at once, without asking the device for anything but their number.

What the host must know are sizes: of tensors, and of random draws. `Candidates` asks for all of
them in one question; everything else stays on the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detectron2.structures import Instances


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; the host does not wait for the copy."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def pad(rows: Sequence[Tensor]) -> Tensor:
    """N x R x ... of N tensors with R rows at most, filled up with zeros; R is at least 1."""
    counts = np.array([len(x) for x in rows])[:, None]
    number = np.arange(max(1, counts.max()))
    # Behind the rows of all there is one of zeros.
    source = np.where(number < counts, np.cumsum(counts)[:, None] - counts + number, counts.sum())
    packed = torch.cat([*rows, rows[0].new_zeros((1, *rows[0].shape[1:]))])
    return packed[to_device(source, packed.device)]


def present(counts: Sequence[int], rows: Tensor) -> Tensor:
    """N x R bool, which rows (N x R x ...) are not filled up, where `counts` are."""
    return to_device(np.arange(rows.shape[1]) < np.array(counts)[:, None], rows.device)


class PaddedTargets(NamedTuple):
    """Ground truth of N images, filled up to G objects: `boxes` (N x G x 4), `classes` and
    `present` (N x G); in images without objects there are boxes without area."""

    boxes: Tensor
    classes: Tensor
    present: Tensor


def pad_targets(targets: Sequence[Instances]) -> PaddedTargets:
    """The ground truth (`gt_boxes`, `gt_classes`) of N images; G is at least 1."""
    boxes = pad([t.gt_boxes.tensor for t in targets])
    classes = pad([t.gt_classes for t in targets])
    counts = [len(t.gt_boxes) for t in targets]
    return PaddedTargets(boxes, classes, present(counts, boxes))


def pairwise_ious(first: Tensor, second: Tensor) -> Tensor:
    """IoUs (... x M x N) of boxes ... x M x 4 and ... x N x 4, the numbers of detectron2's
    `pairwise_iou`."""
    low1, high1 = first.split(2, dim=-1)
    low2, high2 = second.split(2, dim=-1)
    low = torch.maximum(low1[..., None, :], low2[..., None, :, :])
    high = torch.minimum(high1[..., None, :], high2[..., None, :, :])
    width, height = (high - low).clamp_(min=0).unbind(-1)
    both = width * height
    areas = (high1 - low1).prod(-1)[..., None] + (high2 - low2).prod(-1)[..., None, :]
    return (both / (areas - both)).nan_to_num_(0.0)  # of boxes without area


class Draw(NamedTuple):
    """Samples of an image, the positives first: the mask that each is from, its position among the
    true entries of this mask, and the number of positives."""

    masks: np.ndarray
    ranks: np.ndarray
    num_positive: int

    @classmethod
    def of(cls, *ranks: np.ndarray) -> "Draw":
        """Positions in the first mask, that of the positives, then in the second one, ..."""
        masks = np.repeat(np.arange(len(ranks)), [len(x) for x in ranks])
        return cls(masks, np.concatenate(ranks), len(ranks[0]))


class Candidates:
    """The true entries of masks, from which the host draws by their number alone.

    Args:
        masks: N x M x R bool, for each of N images M masks of its R rows.

    Attributes:
        counts: per image and mask, the number of entries.
    """

    def __init__(self, masks: Tensor):
        self.counts: list[list[int]] = masks.sum(dim=2).tolist()
        self._so_far = masks.flatten().cumsum(0)
        self._num_masks, self._num_rows = masks.shape[1:]
        before = np.cumsum(np.array(self.counts, dtype=np.int64).flatten())
        self._before = np.concatenate([[0], before])[:-1]

    def rows(self, drawn: Sequence[Draw]) -> Tensor:
        """(D,) int64 rows `image * R + row` of what was drawn, one image after the other."""
        image = np.repeat(np.arange(len(drawn)), [len(draw.ranks) for draw in drawn])
        mask = image * self._num_masks + np.concatenate([draw.masks for draw in drawn])
        nth = self._before[mask] + np.concatenate([draw.ranks for draw in drawn]) + 1
        shift = (mask - image) * self._num_rows
        nth, shift = to_device(np.stack([nth, shift]), self._so_far.device)
        return torch.searchsorted(self._so_far, nth) - shift


def true_rows(mask: Tensor, count: int) -> Tensor:
    """(`count`,) int64, ascending, the entries of a bool vector of which that many are true."""
    nth = torch.arange(1, count + 1, device=mask.device)
    return torch.searchsorted(mask.cumsum(0), nth)
