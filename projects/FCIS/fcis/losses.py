"""The losses of FCIS' regions one by one, the choice of the hardest among them (online hard example
mining, Shrivastava et al., CVPR 2016), and their sums as the release scales them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F


class RegionLosses(NamedTuple):
    """Losses of R regions, (R,) each: softmax cross-entropy of the class; mean over the pixels of
    the two-way cross-entropy of the mask; sum over the deltas of smooth L1. The last two are 0 for
    background."""

    cls: Tensor
    mask: Tensor
    box: Tensor


def region_losses(
    logits: Tensor,
    seg: Tensor,
    deltas: Tensor,
    labels: Tensor,
    mask_targets: Tensor,
    box_targets: Tensor,
    beta: float,
    positive: Tensor | None = None,
) -> RegionLosses:
    """
    Args:
        logits: R x (K + 1), background last.
        seg: R x 2 x P x P mask logits of the label's class, outside then inside.
        deltas: R x 4.
        labels: (R,) int64, K for background.
        mask_targets: Q x P x P, of the Q positive regions; True is inside.
        box_targets: Q x 4, encoded.
        beta: where smooth L1 turns from L2 to L1.
        positive: (Q,) rows of the positive regions, where they are known.
    """
    cls = F.cross_entropy(logits, labels, reduction="none")
    if positive is None:
        positive = (labels < logits.shape[1] - 1).nonzero()[:, 0]
    mask = F.cross_entropy(seg[positive], mask_targets.long(), reduction="none").mean(dim=(1, 2))
    box = smooth_l1_loss(deltas[positive], box_targets, beta, reduction="none").sum(dim=1)
    nothing = torch.zeros_like(cls)
    return RegionLosses(
        cls, nothing.index_add(0, positive, mask), nothing.index_add(0, positive, box)
    )


@torch.no_grad()
def hardest_regions(losses: RegionLosses, weights: Sequence[float], count: int) -> Tensor:
    """Indices of the `count` regions of one image with the largest weighted loss, hardest first.

    Neither a share of positives nor suppression among the regions (paper, section 2.3).
    """
    key = sum(weight * loss for weight, loss in zip(weights, losses))
    return key.sort(descending=True, stable=True).indices[:count]


def total_losses(
    losses: RegionLosses, kept: Tensor | slice, weights: Sequence[float], batch_size: int
) -> dict[str, Tensor]:
    """Weighted losses of one image.

    The class loss is a mean over the regions kept. The other two are divided by `batch_size`,
    however many positives or regions there are.

    Args:
        kept: indices of the regions that count, or a slice.
        weights: factors of class, mask and box loss.
        batch_size: number of regions wanted per image, 128 in the release.
    """
    count = len(losses.cls[kept])
    cls, mask, box = (weight * loss[kept].sum() for weight, loss in zip(weights, losses))
    return {
        "loss_cls": cls / max(count, 1),
        "loss_mask": mask / batch_size,
        "loss_box_reg": box / batch_size,
    }
