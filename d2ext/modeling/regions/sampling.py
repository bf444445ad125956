"""Random sampling of training regions: reproducible per-image generators, matching of boxes with
ground truth, and `ProposalSampler`, which labels and samples the boxes of one stage."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances, pairwise_iou

_SEEDS: ContextVar[Sequence[int | None]] = ContextVar("image_seeds", default=())


@contextmanager
def image_seeds(batched_inputs: Sequence[dict]) -> Iterator[None]:
    """Within this context, `image_generator` derives from the inputs' `sample_seed`.

    Args:
        batched_inputs: one dict per image; `sample_seed` (int) may be missing.
    """
    token = _SEEDS.set([x.get("sample_seed") for x in batched_inputs])
    try:
        yield
    finally:
        _SEEDS.reset(token)


def image_generator(image: int, tag: str) -> torch.Generator | None:
    """A fresh CPU generator for one image of the batch and one purpose.

    The draws depend on the image's `sample_seed` and on `tag` only, hence neither on the other
    images of the batch nor on how often other parts of the model drew.

    Args:
        image: position in the batch.
        tag: the purpose, e.g. "rpn" or "stage0_box".

    Returns:
        torch.Generator, or None (the global generator) outside of `image_seeds` and for
        images without seed.
    """
    seeds = _SEEDS.get()
    seed = seeds[image] if image < len(seeds) else None
    if seed is None:
        return None
    digest = hashlib.blake2b(f"{int(seed)}/{tag}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _random_subset(indices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the indices in their original order; drawn on the CPU for any device."""
    chosen = torch.randperm(len(indices), generator=generator)[:count].sort().values
    return indices[chosen.to(indices.device)]


def subsample(
    positive: Tensor,
    negative: Tensor,
    size: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw without replacement: positives up to their share, then negatives up to `size`.

    Args:
        positive, negative: bool vectors of one length; in neither means ignored.
        size: number of samples wanted, fewer if candidates lack; -1 keeps all candidates.
        positive_fraction: at most `int(size * positive_fraction)` samples are positive.

    Returns:
        indices of the sampled positives and negatives, each ascending.
    """
    positives, negatives = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
    if size < 0:
        return positives, negatives
    num_positive = min(len(positives), int(size * positive_fraction))
    num_negative = min(len(negatives), size - num_positive)
    return (
        _random_subset(positives, num_positive, generator),
        _random_subset(negatives, num_negative, generator),
    )


def best_matches(iou: Tensor, min_iou: float) -> Tensor:
    """For every box, the ground truth that has no better box than this one.

    MMDetection's "low-quality match": a ground truth claims all boxes that attain its best IoU,
    provided that this IoU is at least `min_iou`; of several claims the last one wins.

    Args:
        iou: M ground truths x N boxes.

    Returns:
        (N,) index of the claiming ground truth, -1 where none claims the box.
    """
    if iou.numel() == 0:
        return torch.full((iou.shape[1],), -1, dtype=torch.int64, device=iou.device)
    best = iou.max(dim=1, keepdim=True).values
    claims = (iou == best) & (best >= min_iou)
    numbers = torch.arange(1, len(iou) + 1, device=iou.device)[:, None]
    return (claims * numbers).max(dim=0).values - 1


class ProposalSampler:
    """Labels boxes by IoU with ground truth and samples a training batch of them per image.

    The output of a call is one `Instances` per image with the fields

    * `proposal_boxes` (Boxes): the R sampled boxes, positives first;
    * `gt_classes` (int64): class of the matched ground truth, `num_classes` for background;
    * `gt_boxes` (Boxes), `gt_index` (int64): the matched ground truth and its row in the
      targets; arbitrary for background, zeros in images without ground truth;
    * `is_gt` (bool): the box is a ground truth that the sampler put in front of the others.

    Masks are not copied per sample: take them by `gt_index` where they are needed.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        iou_threshold: float,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        append_gt: bool = True,
        reassign_low_quality: bool = False,
    ):
        """
        Args:
            num_classes: number of foreground classes, which is also the background label.
            iou_threshold: boxes with at least this IoU with some ground truth are positive.
            batch_size_per_image: number of boxes to sample, -1 for all of them.
            positive_fraction: upper limit of the share of positives.
            append_gt: let the ground-truth boxes take part; they match themselves.
            reassign_low_quality: give a positive box to a ground truth whose best box it is,
                even if it overlaps another one more (see `best_matches`). On in MMDetection's
                Hybrid Task Cascade, off in its Cascade R-CNN; unknown to detectron2.
        """
        self.num_classes = num_classes
        self.iou_threshold = iou_threshold
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.append_gt = append_gt
        self.reassign_low_quality = reassign_low_quality

    def assign(self, boxes: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            boxes: N x 4.
            gt_boxes: M x 4.

        Returns:
            (N,) int64 row of the matched ground truth (0 where M = 0), and (N,)
            bool, whether the box is positive.
        """
        index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        if len(boxes) == 0 or len(gt_boxes) == 0:
            return index, torch.zeros_like(index, dtype=torch.bool)
        iou = pairwise_iou(Boxes(gt_boxes), Boxes(boxes))
        best, index = iou.max(dim=0)
        if self.reassign_low_quality:
            claimed = best_matches(iou, self.iou_threshold)
            index = torch.where(claimed >= 0, claimed, index)
        return index, best >= self.iou_threshold

    @torch.no_grad()
    def __call__(
        self, boxes: Sequence[Boxes], targets: Sequence[Instances], tag: str
    ) -> list[Instances]:
        """
        Args:
            boxes: per image, the candidate boxes in pixels of the network input.
            targets: per image, `Instances` with `gt_boxes` and `gt_classes`.
            tag: purpose of this round, see `image_generator`.
        """
        return [
            self._sample_image(b.tensor, t, image_generator(i, tag))
            for i, (b, t) in enumerate(zip(boxes, targets))
        ]

    def _sample_image(
        self, boxes: Tensor, target: Instances, generator: torch.Generator | None
    ) -> Instances:
        gt_boxes = target.gt_boxes.tensor
        index, positive = self.assign(boxes, gt_boxes)
        is_gt = torch.zeros_like(positive)
        if self.append_gt:
            # From a box without area no deltas can be measured.
            own = target.gt_boxes.nonempty().nonzero()[:, 0]
            boxes = torch.cat([gt_boxes[own].to(boxes.dtype), boxes])
            index = torch.cat([own, index])
            positive = torch.cat([torch.ones_like(own, dtype=torch.bool), positive])
            is_gt = torch.cat([torch.ones_like(own, dtype=torch.bool), is_gt])
        sampled = torch.cat(
            subsample(
                positive, ~positive, self.batch_size_per_image, self.positive_fraction, generator
            )
        )
        index, positive = index[sampled], positive[sampled]

        result = Instances(target.image_size)
        result.proposal_boxes = Boxes(boxes[sampled])
        result.gt_index = index
        result.is_gt = is_gt[sampled]
        background = torch.full_like(index, self.num_classes)
        if len(gt_boxes) == 0:
            result.gt_classes = background
            result.gt_boxes = Boxes(torch.zeros_like(result.proposal_boxes.tensor))
        else:
            result.gt_classes = torch.where(positive, target.gt_classes[index], background)
            result.gt_boxes = Boxes(gt_boxes[index])
        return result
