"""RoI poolers with the call of detectron2's `ROIPooler`.

They take `(feature maps, box lists)` where a head would take an `ROIPooler`; a box list is
anything with a `tensor` of shape (n, 4), such as detectron2's `Boxes`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.ops.pyramid_roi_align import pyramid_roi_align
from d2ext.ops.reference.pyramid_roi_align import pyramid_levels
from d2ext.ops.roi_warp import RoIWarp, pair


def boxes_to_rois(box_lists: Sequence[Any], *, inclusive: bool = False) -> Tensor:
    """Stack per-image boxes to rows of image index, x1, y1, x2, y2, keeping gradients.

    Args:
        box_lists: one per image, each with `tensor` (n, 4) in pixels, x2 and y2 exclusive.
        inclusive: subtract 1 from x2 and y2.
    """
    rows = []
    for image, boxes in enumerate(box_lists):
        corners = boxes.tensor
        if corners.dtype not in (torch.float32, torch.float64):
            corners = corners.float()
        if inclusive:
            corners = corners - corners.new_tensor([0.0, 0.0, 1.0, 1.0])
        rows.append(torch.cat([corners.new_full((corners.shape[0], 1), float(image)), corners], 1))
    return torch.cat(rows)


def _check_call(pooler: nn.Module, x: Sequence[Tensor], box_lists: Sequence[Any], levels: int):
    name = type(pooler).__name__
    if len(x) != levels:
        expected = "one feature level" if levels == 1 else f"{levels} feature levels"
        raise ValueError(f"{name}: {expected} expected, got {len(x)}")
    if len(box_lists) != x[0].shape[0]:
        raise ValueError(f"{name}: {x[0].shape[0]} images but {len(box_lists)} box lists")


class PyramidROIAlignPooler(nn.Module):
    """detectron2's `ROIPooler` with `ROIAlignV2`, all levels in one call of `pyramid_roi_align`.

    It takes the arguments of `ROIPooler`. Boxes keep float32 beside features in half precision,
    where `ROIPooler` rounds them too.

    Args:
        output_size: output height and width.
        scales: feature cells per pixel of each level, the finest first; powers of two.
        sampling_ratio: samples per bin and axis; 0 adapts it to the box.
        pooler_type: there for configs written for `ROIPooler`; "ROIAlignV2" and "PyramidROIAlign"
            are the same here, and others are refused.
        canonical_box_size, canonical_level: see `d2ext.ops.pyramid_roi_align`.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str = "PyramidROIAlign",
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        if pooler_type not in ("PyramidROIAlign", "ROIAlignV2"):
            raise ValueError(
                f"PyramidROIAlignPooler: pooler_type {pooler_type!r} is none of"
                " 'PyramidROIAlign', 'ROIAlignV2'"
            )
        self.output_size = pair(output_size)
        self.scales = [float(scale) for scale in scales]
        self.sampling_ratio = sampling_ratio
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(self, x: list[Tensor], box_lists: Sequence[Any], average: int = 1) -> Tensor:
        """
        Args:
            x: feature maps (B, C, H, W), one per scale.
            box_lists: B box lists in pixels of the network input.
            average: pool at `output_size` and average squares of this side; both output sizes have
                to be multiples of it.

        Returns:
            (M, C, height / average, width / average) with M boxes in total, in the order of
            `box_lists`.
        """
        _check_call(self, x, box_lists, len(self.scales))
        height, width = self.output_size
        if height % average or width % average:
            raise ValueError(
                f"PyramidROIAlignPooler: output size {height} x {width} is no multiple of {average}"
            )
        if len(box_lists):
            rois = boxes_to_rois(box_lists)
            rois = rois if x[0].dtype == torch.float64 else rois.float()
        else:
            rois = x[0].new_zeros((0, 5), dtype=torch.float32)
        return pyramid_roi_align(
            x, rois, (height // average, width // average), self.scales,
            sampling_ratio=self.sampling_ratio, average=average,
            canonical_size=self.canonical_box_size, canonical_level=self.canonical_level,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales},"
            f" sampling_ratio={self.sampling_ratio}"
        )


def pool_averaged(
    pooler: nn.Module, x: list[Tensor], box_lists: Sequence[Any], size: tuple[int, int]
) -> Tensor:
    """`pooler(x, box_lists)`, then `adaptive_avg_pool2d` to `size`.

    One step, without the finer features, where a `PyramidROIAlignPooler` has a multiple of `size`.
    """
    if isinstance(pooler, PyramidROIAlignPooler):
        factor = max(pooler.output_size[0] // size[0], 1)
        if (size[0] * factor, size[1] * factor) == pooler.output_size:
            return pooler(x, box_lists, average=factor)
    return F.adaptive_avg_pool2d(pooler(x, box_lists), size)


class RoIWarpPooler(nn.Module):
    """`RoIWarp` as a pooler; gradients reach the boxes.

    Args:
        output_size: output height and width.
        scales: feature cells per pixel of each level, the finest first. Of several levels, powers
            of two, a box is read from the one that `ROIPooler` would take; which one has no
            gradient.
        max_pool, aligned, quantize, border, bin_reduce: as in `RoIWarp`. Unless `aligned`,
            1 is subtracted from x2 and y2 first: MNC's sampling counts pixels by their indices.
        canonical_box_size, canonical_level: see `d2ext.ops.pyramid_roi_align`.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        *,
        max_pool: bool = False,
        aligned: bool = True,
        quantize: bool = False,
        border: str = "clamp_half",
        bin_reduce: str = "point",
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.scales = [float(scale) for scale in scales]
        for fine, coarse in zip(self.scales, self.scales[1:]):
            if fine != 2 * coarse:
                raise ValueError("RoIWarpPooler: every scale must be half of the one before")
        self.operator, *coarser = (
            RoIWarp(
                output_size, scale, max_pool=max_pool, aligned=aligned, quantize=quantize,
                border=border, bin_reduce=bin_reduce,
            )
            for scale in self.scales
        )  # fmt: skip
        self.coarser = nn.ModuleList(coarser)
        self.output_size = self.operator.output_size
        self.canonical = (canonical_box_size, canonical_level)

    def forward(self, x: list[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """
        Args:
            x: feature maps (B, C, H, W), one per scale.
            box_lists: B box lists in pixels of the network input, x2 and y2 exclusive.

        Returns:
            (M, C, height, width) with M boxes in total, in the order of `box_lists`.
        """
        _check_call(self, x, box_lists, len(self.scales))
        rois = boxes_to_rois(box_lists, inclusive=not self.operator.aligned)
        if not self.coarser:
            return self.operator(x[0], rois)
        levels = pyramid_levels(boxes_to_rois(box_lists).detach(), self.scales, *self.canonical)
        total: Any = None
        for level, operator in enumerate((self.operator, *self.coarser)):
            # rows of other levels get a negative index, which means zeros and no gradient
            image = torch.where(levels == level, rois[:, 0], -1.0)
            part = operator(x[level], torch.cat([image[:, None], rois[:, 1:]], 1))
            total = part if total is None else total + part
        return total
