"""Random sampling of training regions: reproducible per-image generators, matching of boxes with
ground truth, and `ProposalSampler`, which labels and samples the boxes of one stage."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

from d2ext.modeling.regions.batching import (
    Candidates,
    Draw,
    pad,
    pad_targets,
    pairwise_ious,
    present,
    to_device,
)
from d2ext.modeling.regions.samples import Samples, gather_samples, split_samples

from detectron2.structures import Boxes, Instances

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


def random_ranks(total: int, count: int, generator: torch.Generator | None = None) -> np.ndarray:
    """`count` of the numbers below `total`, ascending; drawn on the host."""
    return np.sort(torch.randperm(total, generator=generator).numpy()[:count])


def share_ranks(
    num_positive: int,
    num_negative: int,
    size: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw without replacement: positives up to their share, then negatives up to `size`.

    Args:
        num_positive, num_negative: numbers of candidates.
        size: number of samples wanted, fewer if candidates lack; -1 keeps all candidates.
        positive_fraction: at most `int(size * positive_fraction)` samples are positive.

    Returns:
        which of the positives and which of the negatives are drawn, each ascending.
    """
    if size < 0:
        return np.arange(num_positive), np.arange(num_negative)
    positives = min(num_positive, int(size * positive_fraction))
    negatives = min(num_negative, size - positives)
    return (
        random_ranks(num_positive, positives, generator),
        random_ranks(num_negative, negatives, generator),
    )


def best_matches(iou: Tensor, min_iou: float) -> Tensor:
    """For every box, the ground truth that has no better box than this one.

    MMDetection's "low-quality match": a ground truth claims all boxes that attain its best IoU,
    provided that this IoU is at least `min_iou`; of several claims the last one wins.

    Args:
        iou: ... x M ground truths x N boxes.

    Returns:
        (... x N) index of the claiming ground truth, -1 where none claims the box.
    """
    if iou.numel() == 0:
        return iou.new_full((*iou.shape[:-2], iou.shape[-1]), -1, dtype=torch.int64)
    best = iou.amax(dim=-1, keepdim=True)
    claims = (iou == best) & (best >= min_iou)
    numbers = torch.arange(1, iou.shape[-2] + 1, device=iou.device)[:, None]
    return (claims * numbers).amax(dim=-2) - 1


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
        index, overlap = self._match(boxes, gt_boxes)
        return index, overlap >= self.iou_threshold

    def _match(
        self, boxes: Tensor, gt_boxes: Tensor, exists: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Row of the matched ground truth, and highest IoU with any (-1 where there is none).

        Args:
            boxes: ... x N x 4.
            gt_boxes: ... x M x 4.
            exists: ... x M bool, False for what fills up; None where nothing does.
        """
        if boxes.shape[-2] == 0 or gt_boxes.shape[-2] == 0:
            overlap = boxes.new_full(boxes.shape[:-1], -1)
            return torch.zeros_like(overlap, dtype=torch.int64), overlap
        iou = pairwise_ious(gt_boxes, boxes)
        if exists is not None:
            iou = iou.masked_fill(~exists[..., None], -1)
        overlap, index = iou.max(dim=-2)
        if self.reassign_low_quality:
            claimed = best_matches(iou, self.iou_threshold)
            index = torch.where(claimed >= 0, claimed, index)
        return index, overlap

    @torch.no_grad()
    def __call__(
        self, boxes: Sequence[Boxes], targets: Sequence[Instances], tag: str
    ) -> list[Samples]:
        """
        Args:
            boxes: per image, the candidate boxes in pixels of the network input.
            targets: per image, `Instances` with `gt_boxes` and `gt_classes`.
            tag: purpose of this round, see `image_generator`.
        """
        counts, gt = [len(b) for b in boxes], pad_targets(targets)
        boxes = pad([b.tensor for b in boxes])
        index, overlap = self._match(boxes, gt.boxes, gt.present)
        # From a box without area no deltas can be measured.
        own = gt.present & (gt.boxes[..., 2:] > gt.boxes[..., :2]).all(dim=2) & self.append_gt
        candidates = Candidates(self._masks(own, overlap, present(counts, boxes)))
        drawn = [self._draw(c, image_generator(i, tag)) for i, c in enumerate(candidates.counts)]
        own_index = torch.arange(own.shape[1], device=own.device).expand(own.shape)
        fields = gather_samples(
            drawn,
            candidates.rows(drawn),
            torch.cat([gt.boxes.to(boxes.dtype), boxes], dim=1),
            torch.cat([own_index, index], dim=1),
            gt,
            self.num_classes,
        )
        del fields["positive"]
        # The ground truths, counted by the last mask, come first among the positives.
        is_gt = [(d.masks == 0) & (d.ranks < c[-1]) for d, c in zip(drawn, candidates.counts)]
        fields["is_gt"] = to_device(np.concatenate(is_gt), own.device)
        num_gt = [int(x[: d.num_positive].sum()) for x, d in zip(is_gt, drawn)]
        return split_samples(fields, drawn, targets, num_gt)

    def _masks(self, own: Tensor, overlap: Tensor, exists: Tensor) -> Tensor:
        """What to draw from, ground truths and boxes together: positives, negatives, ..., and last
        the ground truths (N x masks x (G + R) bool).

        Args:
            own: N x G bool, the ground truths to append.
            overlap: N x R, highest IoU of each box with any ground truth.
            exists: N x R bool, False for what fills up.
        """
        none, positive = torch.zeros_like(own), overlap >= self.iou_threshold
        masks = [torch.cat([own, positive & exists], dim=1)]
        masks += [torch.cat([none, x & exists], 1) for x in self._negatives(positive, overlap)]
        return torch.stack([*masks, torch.cat([own, torch.zeros_like(exists)], 1)], dim=1)

    def _negatives(self, positive: Tensor, overlap: Tensor) -> list[Tensor]:
        """Masks (N x R) of boxes to draw as background."""
        return [~positive]

    def _draw(self, counts: Sequence[int], generator: torch.Generator | None) -> Draw:
        """The sample of an image.

        Args:
            counts: number of true entries of each mask.
        """
        share = self.batch_size_per_image, self.positive_fraction
        return Draw.of(*share_ranks(*counts[:2], *share, generator))
