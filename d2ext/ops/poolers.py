"""A RoI pooler with the call of detectron2's `ROIPooler`, for one feature level.

It takes `(feature maps, box lists)` where a head would take an `ROIPooler`; a box list is
anything with a `tensor` of shape (n, 4), such as detectron2's `Boxes`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2ext.ops.roi_warp import RoIWarp


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
        rows.append(torch.cat([corners.new_full((len(corners), 1), float(image)), corners], 1))
    return torch.cat(rows)


class RoIWarpPooler(nn.Module):
    """`RoIWarp` as a pooler; gradients reach the boxes.

    Args:
        output_size: output height and width.
        scales: one number, feature cells per pixel.
        max_pool, aligned, quantize, border, bin_reduce: as in `RoIWarp`. Unless `aligned`,
            1 is subtracted from x2 and y2 first: MNC's sampling counts pixels by their indices.
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
    ) -> None:
        super().__init__()
        scales = list(scales)
        if len(scales) != 1:
            raise ValueError(f"one scale expected, got {len(scales)}: this pooler reads one level")
        self.operator = RoIWarp(
            output_size, float(scales[0]), max_pool=max_pool, aligned=aligned, quantize=quantize,
            border=border, bin_reduce=bin_reduce,
        )  # fmt: skip
        self.output_size = self.operator.output_size

    def forward(self, x: list[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """
        Args:
            x: a list of one feature map (B, C, H, W).
            box_lists: B box lists in pixels of the network input, x2 and y2 exclusive.

        Returns:
            (M, C, height, width) with M boxes in total, in the order of `box_lists`.
        """
        if len(x) != 1:
            raise ValueError(f"RoIWarpPooler: one feature level expected, got {len(x)}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(
                f"RoIWarpPooler: {x[0].shape[0]} images but {len(box_lists)} box lists"
            )
        return self.operator(x[0], boxes_to_rois(box_lists, inclusive=not self.operator.aligned))
