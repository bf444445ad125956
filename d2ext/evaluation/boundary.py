"""Boundary IoU: the overlap of two masks near their outlines.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021. The
boundary of a mask is its part within a distance of 2% of the image's diagonal from the outside, to
which everything beyond the image belongs. Boundary AP takes the smaller of mask and boundary IoU.
"""

import math

import cv2
import numpy as np
import pycocotools.mask as mask_util

from d2ext.errors import UserError

DILATION_RATIO = 0.02


def boundary_width(size: tuple[int, int], ratio: float = DILATION_RATIO) -> int:
    """Width of the boundary in pixels, at least 1, in an image of (height, width)."""
    return max(1, int(round(ratio * math.hypot(*size))))


def mask_boundary(mask: np.ndarray, ratio: float = DILATION_RATIO) -> np.ndarray:
    """Pixels of a mask at most `boundary_width` away (in the larger of dx and dy) from the outside.

    Args:
        mask: (H, W), bool or uint8, a whole image.
        ratio: of the width to the diagonal of the image.

    Returns:
        uint8 (H, W), 0 or 1.
    """
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    width = boundary_width(mask.shape, ratio)
    result = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return result
    # All that is eroded lies inside the box of the mask, whose surroundings are outside.
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    padded = np.pad(mask[box], 1)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    result[box] = mask[box] - inner[1:-1, 1:-1]
    return result


def boundary_rle(rle: dict, ratio: float = DILATION_RATIO) -> dict:
    """Run-length code of the boundary of a run-length coded mask."""
    return mask_util.encode(np.asfortranarray(mask_boundary(mask_util.decode(rle), ratio)))


def boundary_iou(first: np.ndarray, second: np.ndarray, ratio: float = DILATION_RATIO) -> float:
    """IoU of the boundaries of two masks of one image, 0 if both are empty.

    Raises:
        UserError: the masks have different sizes.
    """
    if np.shape(first) != np.shape(second):
        raise UserError(
            f"two masks of one image have one size; these are {np.shape(first)} and "
            f"{np.shape(second)}"
        )
    first, second = (mask_boundary(mask, ratio).astype(bool) for mask in (first, second))
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0
