"""Losses of region heads. Every one is a sum divided by a count over *all* processes, so that the
gradient averaged by DistributedDataParallel equals that of one process with the whole batch. The
same holds for the parts of a batch, see `d2ext.modeling.parts`.

Shape shorthand: R sampled regions of all images, Q positive ones, K classes, S mask size."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.parts import measured_count, note_count, number_of_parts
from d2ext.modeling.regions.samples import positive_rows

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm


def global_mean_count(n: int | Tensor, device: torch.device) -> Tensor:
    """Sum of `n` over all processes divided by their number; with one process, just `n`. Where a
    batch is computed in parts, the mean over these as well.

    A collective operation: every process has to call it, also with n = 0; so has every part.

    Returns:
        float32 scalar without gradient.
    """
    measured = measured_count()
    if measured is not None:
        return measured
    count = torch.as_tensor(n, dtype=torch.float32, device=device).detach().clone()
    processes = comm.get_world_size()
    if processes > 1:
        dist.all_reduce(count)
        count /= processes
    return note_count(count)


def divide_by_count(total: Tensor, n: int | Tensor) -> Tensor:
    """`total / global_mean_count(n)`; 0 (connected to the graph) where the count is 0."""
    # The smallest positive count is one item on one of the processes, in one of the parts.
    smallest = 1.0 / (comm.get_world_size() * number_of_parts())
    return total / global_mean_count(n, total.device).clamp(min=smallest)


def connect_features(losses: dict[str, Tensor], features: Iterable[Tensor]) -> dict[str, Tensor]:
    """The losses with a zero that depends on all feature maps, if there are several processes.

    DistributedDataParallel waits for the gradients of all parameters, also for those of feature
    maps that no part of the network reads.

    Args:
        losses: scalars; the first of them gets the zero.
        features: of any shape, finite.
    """
    if comm.get_world_size() == 1:
        return losses
    name = next(iter(losses))
    return {**losses, name: losses[name] + 0 * sum(x.mean() for x in features)}


def pick_class(x: Tensor, classes: Tensor) -> Tensor:
    """Channel of each region's class; channel 0 of class-agnostic predictions.

    Args:
        x: R x C x ..., C = K or 1.
        classes: (R,) int64 in [0, K).

    Returns:
        R x ...
    """
    if x.shape[1] == 1:
        return x[:, 0]
    return x[torch.arange(x.shape[0], device=x.device), classes]


def classification_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax cross-entropy, mean over regions.

    Args:
        logits: R x (K + 1), background last.
        classes: (R,) int64 in [0, K].
    """
    total = F.cross_entropy(logits.float(), classes, reduction="sum")
    return divide_by_count(total, len(classes))


def box_regression_loss(
    deltas: Tensor,
    proposals: Sequence[Instances],
    transform: Box2BoxTransform,
    num_classes: int,
    beta: float,
) -> Tensor:
    """Smooth L1 over the positives and their 4 coordinates, divided by the number of *all* regions.

    Args:
        deltas: R x 4 (class-agnostic) or R x 4K predictions.
        proposals: per image, with `proposal_boxes`, `gt_boxes`, `gt_classes`.
        transform: encodes the targets.
        num_classes: K, the background label.
        beta: where L2 turns to L1, in units of the encoded deltas; 0 is L1.
    """
    classes = torch.cat([p.gt_classes for p in proposals])
    boxes = Boxes.cat([p.proposal_boxes for p in proposals]).tensor
    gt_boxes = Boxes.cat([p.gt_boxes for p in proposals]).tensor
    positive, _ = positive_rows(proposals, num_classes)
    predicted = deltas.float().view(len(deltas), deltas.shape[1] // 4, 4)[positive]
    predicted = pick_class(predicted, classes[positive])
    # Only positives have boxes that are certain to be encodable.
    targets = transform.get_deltas(boxes[positive], gt_boxes[positive])
    return divide_by_count(smooth_l1_loss(predicted, targets, beta, reduction="sum"), len(classes))


def mask_bce_loss(logits: Tensor, classes: Tensor, targets: list[Tensor]) -> Tensor:
    """Binary cross-entropy on the channel of the ground-truth class, mean over regions and pixels.

    Args:
        logits: Q x K x S x S, or Q x 1 x S x S for class-agnostic masks.
        classes: (Q,) int64.
        targets: bool masks of each image that has regions; Q x S x S together.
    """
    picked = pick_class(logits.float(), classes)
    targets = torch.cat(targets).to(picked.dtype) if targets else torch.zeros_like(picked)
    total = F.binary_cross_entropy_with_logits(picked, targets, reduction="sum")
    return divide_by_count(total / (logits.shape[-2] * logits.shape[-1]), len(classes))
