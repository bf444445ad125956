"""RoI poolers with the call of detectron2's ``ROIPooler``, for one feature level.

They take ``(feature maps, box lists)`` where a head would take an ``ROIPooler``; a box list is
anything with a ``tensor`` of shape (n, 4), such as detectron2's ``Boxes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2ext.ops.ps_roi import PSRoIAssemble, PSRoIMean
from d2ext.ops.roi_warp import RoIWarp


def boxes_to_rois(box_lists: Sequence[Any], *, inclusive: bool = False) -> Tensor:
    """Stack per-image boxes to rows of image index, x1, y1, x2, y2, keeping gradients.

    Args:
        box_lists: one per image, each with ``tensor`` (n, 4) in pixels, x2 and y2 exclusive.
        inclusive: subtract 1 from x2 and y2.
    """
    rows = []
    for image, boxes in enumerate(box_lists):
        corners = boxes.tensor
        if corners.dtype not in (torch.float32, torch.float64):
            corners = corners.float()
        if inclusive:
            corners = corners - corners.new_tensor([0.0, 0.0, 1.0, 1.0])
        rows.append(torch.cat([corners.new_full((len(corners), 1), float(image)), corners], 1))
    return torch.cat(rows)


class _Pooler(nn.Module):
    """One feature level, one operator on rois."""

    def __init__(self, operator: nn.Module, output_size: tuple[int, int], inclusive: bool) -> None:
        super().__init__()
        self.operator = operator
        self.output_size = output_size
        self.inclusive = inclusive

    def forward(self, x: list[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """
        Args:
            x: a list of one feature map (B, C, H, W).
            box_lists: B box lists in pixels of the network input, x2 and y2 exclusive.

        Returns:
            (M, C', ...) with M boxes in total, in the order of ``box_lists``.
        """
        if len(x) != 1:
            raise ValueError(f"{type(self).__name__}: one feature level expected, got {len(x)}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(
                f"{type(self).__name__}: {x[0].shape[0]} images but {len(box_lists)} box lists"
            )
        return self.operator(x[0], boxes_to_rois(box_lists, inclusive=self.inclusive))


class RoIWarpPooler(_Pooler):
    """:class:`RoIWarp` as a pooler; gradients reach the boxes.

    Args:
        output_size: output height and width.
        scales: one number, feature cells per pixel.
        max_pool, aligned, legacy, border, bin_reduce: as in :class:`RoIWarp`.
        inclusive: subtract 1 from x2 and y2 first. None does so unless ``aligned``: MNC's sampling
            counts pixels by their indices.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        *,
        max_pool: bool = False,
        aligned: bool = True,
        legacy: bool = False,
        border: str = "clamp_half",
        bin_reduce: str = "point",
        inclusive: bool | None = None,
    ) -> None:
        operator = RoIWarp(
            output_size, _only(scales), max_pool=max_pool, aligned=aligned, legacy=legacy,
            border=border, bin_reduce=bin_reduce,
        )  # fmt: skip
        super().__init__(
            operator, operator.output_size, not aligned if inclusive is None else inclusive
        )


class PSRoIPooler(_Pooler):
    """:class:`PSRoIAssemble`, or with ``mean`` :class:`PSRoIMean`, as a pooler.

    Args:
        output_size: P, see :func:`ps_roi_assemble`.
        scales: one number, feature cells per pixel.
        group_size, copy, legacy: as in :func:`ps_roi_assemble`.
        inclusive: subtract 1 from x2 and y2 first. None does so when ``legacy``.
    """

    def __init__(
        self,
        output_size: int,
        scales: Sequence[float],
        *,
        group_size: int = 7,
        mean: bool = False,
        copy: bool = False,
        legacy: bool = False,
        inclusive: bool | None = None,
    ) -> None:
        kind = PSRoIMean if mean else PSRoIAssemble
        operator = kind(_only(scales), group_size, output_size, copy=copy, legacy=legacy)
        size = (1, 1) if mean else (output_size, output_size)
        super().__init__(operator, size, legacy if inclusive is None else inclusive)


def _only(scales: Sequence[float]) -> float:
    scales = list(scales)
    if len(scales) != 1:
        raise ValueError(f"one scale expected, got {len(scales)}: these poolers read one level")
    return float(scales[0])
