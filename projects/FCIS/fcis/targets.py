"""Training targets of FCIS' regions: which regions, their classes, and their masks."""

from typing import Optional, Union

import torch
from torch import Tensor

from d2ext.modeling.sampling import ProposalSampler, subsample
from d2ext.structures import to_inclusive

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, pairwise_iou

__all__ = ["RegionSampler", "crop_mask_targets"]


class RegionSampler(ProposalSampler):
    """All proposals and ground truths of an image, or a random sample of them.

    The output is that of :class:`ProposalSampler`. To keep all of them is what hard example mining
    wants; a sample holds up to ``positive_fraction`` positives, then background that overlaps some
    object by ``background_iou``. As in the release, a sample that is still too small is filled up
    with anything but the positives it holds, *labelled as background* (also positives that were not
    drawn), repeatedly if need be.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        iou_threshold: float = 0.5,
        batch_size_per_image: int = -1,
        positive_fraction: float = 0.25,
        background_iou: float = 0.0,
        append_gt: bool = True,
    ):
        """
        Args:
            num_classes, iou_threshold, positive_fraction, append_gt: see :class:`ProposalSampler`.
            batch_size_per_image (int): size of the sample, -1 for all regions.
            background_iou (float): see the class.
        """
        super().__init__(
            num_classes=num_classes,
            iou_threshold=iou_threshold,
            batch_size_per_image=-1,
            positive_fraction=positive_fraction,
            append_gt=append_gt,
        )
        self.num_samples = batch_size_per_image
        self.background_iou = background_iou

    def _sample_image(
        self, boxes: Tensor, target: Instances, generator: Optional[torch.Generator]
    ) -> Instances:
        regions = super()._sample_image(boxes, target, generator)
        if self.num_samples < 0:
            return regions
        positive = regions.gt_classes < self.num_classes
        background = ~positive & (self._best_iou(regions, target) >= self.background_iou)
        positives, negatives = subsample(
            positive, background, self.num_samples, self.positive_fraction, generator
        )
        others = torch.ones_like(positive).index_fill(0, positives, False).nonzero()[:, 0]
        missing = self.num_samples - len(positives) - len(negatives)
        while missing > 0 and len(others):
            drawn = torch.randperm(len(others), generator=generator)[:missing].to(others.device)
            negatives = torch.cat([negatives, others[drawn]])
            missing -= len(drawn)
        sample = regions[torch.cat([positives, negatives])]
        sample.gt_classes[len(positives) :] = self.num_classes
        return sample

    @staticmethod
    def _best_iou(regions: Instances, target: Instances) -> Tensor:
        if len(target) == 0:
            return torch.zeros(len(regions), device=regions.gt_classes.device)
        return pairwise_iou(target.gt_boxes, regions.proposal_boxes).max(dim=0).values


def _axis(low: Tensor, high: Tensor, size: int):
    """Positions at which one axis of the regions is sampled: two cells each and their weight."""
    length = (high - low + 1)[:, None]
    position = (torch.arange(size, device=low.device) + 0.5) * length / size - 0.5
    position = torch.minimum(position.clamp(min=0), length - 1)
    first = position.floor()
    last = torch.minimum(first + 1, length - 1)
    start = low[:, None]
    return (start + first).long(), (start + last).long(), position - first


def crop_mask_targets(
    gt_masks: Union[BitMasks, PolygonMasks],
    gt_boxes: Boxes,
    gt_index: Tensor,
    boxes: Tensor,
    size: int,
    threshold: float = 0.4,
) -> Tensor:
    """The ground-truth mask inside each region, resized and made binary as in the release.

    Boxes are rounded to whole pixels; a mask does not reach out of its own rounded box, and what of
    the region lies outside is background. The resize is bilinear with half-pixel centres, without
    antialiasing.

    Args:
        gt_masks: M masks at network-input resolution.
        gt_boxes: their M boxes, continuous.
        gt_index (Tensor): (Q,) int64 row of each region's mask.
        boxes (Tensor): Q x 4 regions, continuous corners in pixels of the network input.
        size (int): S.
        threshold (float): values from it on are inside.

    Returns:
        Tensor: Q x S x S, bool.
    """
    if len(boxes) == 0:
        return torch.zeros((0, size, size), dtype=torch.bool, device=boxes.device)
    if isinstance(gt_masks, PolygonMasks):
        height, width = (int(x) for x in boxes.reshape(-1, 2).amax(dim=0).flip(0).ceil() + 1)
        gt_masks = BitMasks.from_polygon_masks(gt_masks, height, width).to(boxes.device)
    masks = gt_masks.tensor
    region = to_inclusive(boxes).round()
    limit = to_inclusive(gt_boxes.tensor[gt_index]).round()
    axes = []
    for axis, extent in ((0, masks.shape[2]), (1, masks.shape[1])):
        first, last, weight = _axis(region[:, axis], region[:, axis + 2], size)
        cells = torch.stack([first, last])
        low, high = limit[:, axis, None], limit[:, axis + 2, None]
        inside = (cells >= low) & (cells <= high) & (cells >= 0) & (cells < extent)
        axes.append((cells.clamp(0, extent - 1), inside, torch.stack([1 - weight, weight])))
    (columns, in_x, weight_x), (rows, in_y, weight_y) = axes
    image = gt_index[:, None, None]
    value = boxes.new_zeros(len(boxes), size, size)
    for y in range(2):
        for x in range(2):
            weight = (weight_y[y] * in_y[y])[:, :, None] * (weight_x[x] * in_x[x])[:, None, :]
            value += masks[image, rows[y][:, :, None], columns[x][:, None, :]] * weight
    return value >= threshold
