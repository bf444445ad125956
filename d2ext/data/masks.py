"""Ground-truth masks of one image as bitmaps."""

import numpy as np
import torch

from detectron2.structures import BitMasks, PolygonMasks


def areas(masks: torch.Tensor) -> torch.Tensor:
    """Pixels of each of some bool masks (N, H, W) on the CPU, int64 (N,)."""
    counts = [np.count_nonzero(mask) for mask in masks.numpy()]
    return torch.tensor(counts, dtype=torch.int64)


def bitmaps(masks: BitMasks | PolygonMasks, image_size: tuple[int, int]) -> torch.Tensor:
    """Either mask structure as a bool tensor (N, H, W).

    Args:
        masks: N masks.
        image_size: H, W; parts of polygons outside are cut off.
    """
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *image_size)
    return masks.tensor
