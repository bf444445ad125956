"""What samplers return: boxes of each image with the ground truth that they matched, the positives
first, gathered for all images at once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import Draw, PaddedTargets, to_device, true_rows

from detectron2.structures import Boxes, Instances


class Samples(Instances):
    """Boxes of an image, the positives first, of which the host knows how many there are.

    Args:
        num_positive: number of positives.
        num_gt: how many of these, the first, are ground truths that the sampler put there.
        fields: as for `Instances`.
    """

    def __init__(self, image_size, num_positive: int, num_gt: int = 0, **fields):
        super().__init__(image_size, **fields)
        self._counts = num_positive, num_gt

    @property
    def num_positive(self) -> int:
        return self._counts[0]

    @property
    def num_gt(self) -> int:
        return self._counts[1]


def gather_samples(
    drawn: Sequence[Draw],
    rows: Tensor,
    boxes: Tensor,
    index: Tensor,
    gt: PaddedTargets,
    num_classes: int,
) -> dict[str, Tensor]:
    """Fields of the samples of all N images, one image after the other.

    Args:
        rows: (D,) int64 rows of `boxes` taken as one list.
        boxes: N x R x 4, the candidates.
        index: N x R int64, the row of the ground truth of each.
        num_classes: label of what is not positive.

    Returns:
        `proposal_boxes`, `gt_boxes` (D x 4), `gt_index`, `gt_classes` (D,), and `positive` (bool).
    """
    index = index.flatten()[rows]
    matched = rows.div(boxes.shape[1], rounding_mode="floor") * gt.boxes.shape[1] + index
    positive = [np.arange(len(draw.ranks)) < draw.num_positive for draw in drawn]
    positive = to_device(np.concatenate(positive), rows.device)
    return {
        "proposal_boxes": boxes.flatten(0, 1)[rows],
        "gt_boxes": gt.boxes.to(boxes.dtype).flatten(0, 1)[matched],
        "gt_index": index,
        "gt_classes": gt.classes.flatten()[matched].masked_fill(~positive, num_classes),
        "positive": positive,
    }


def split_samples(
    fields: dict[str, Tensor],
    drawn: Sequence[Draw],
    targets: Sequence[Instances],
    num_gt: Sequence[int],
    as_boxes: Callable[[Tensor], Boxes] = Boxes,
) -> list[Samples]:
    """The samples of each image, of the fields of all of them."""
    parts = zip(*(x.split([len(draw.ranks) for draw in drawn]) for x in fields.values()))
    samples = []
    for part, draw, target, count in zip(parts, drawn, targets, num_gt, strict=True):
        values = dict(zip(fields, part))
        for name in ("proposal_boxes", "gt_boxes"):
            values[name] = as_boxes(values[name])
        samples.append(Samples(target.image_size, draw.num_positive, count, **values))
    return samples


def positive_rows(samples: Sequence[Instances], num_classes: int) -> tuple[Tensor, list[int]]:
    """(Q,) int64 rows of the positives (`gt_classes` below `num_classes`) among the boxes of all
    images, and how many each image has. Asks the device unless all of them are `Samples`."""
    counts = [len(s) for s in samples]
    if all(isinstance(s, Samples) for s in samples):
        starts, positives = np.cumsum([0, *counts]), [s.num_positive for s in samples]
        rows = [np.arange(start, start + n) for start, n in zip(starts, positives)]
        return to_device(np.concatenate(rows), samples[0].gt_classes.device), positives
    positive = torch.cat([s.gt_classes for s in samples]) < num_classes
    positives = torch.stack([x.sum() for x in positive.split(counts)]).tolist()
    return true_rows(positive, sum(positives)), positives
