"""Polygons that cover exactly the pixels of a mask: along the edges of pixels, where x = 0 is the
left edge of the first one.

A hole is joined with the polygon around it by a cut of no width, as YOLO's data sets have it:
whoever fills by the even-odd rule, as pycocotools does, leaves it out.
"""

import cv2
import numpy as np


def outlines(mask: np.ndarray) -> list[list[float]]:
    """A flat polygon `[x0, y0, x1, y1, ...]` of each connected part of a mask (H, W), with its
    holes; none of an empty mask."""
    if not mask.any():
        return []
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    top, left = int(rows[0]), int(columns[0])
    part = np.asarray(mask[top : rows[-1] + 1, left : columns[-1] + 1], np.uint8)
    # Twice as large, pixels of the mask have a first and a last row: halved, those are its edges.
    fine = part.repeat(2, 0).repeat(2, 1)
    found, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = [_corners((ring[:, 0] + 1) // 2) for ring in found]
    polygons = []
    for number, (_, _, child, parent) in enumerate(hierarchy[0].tolist()):
        if parent >= 0:
            continue
        joined = rings[number]
        while child >= 0:
            joined = join_rings(joined, rings[child])
            child = hierarchy[0][child][0]
        polygons.append((joined + (left, top)).ravel().astype(float).tolist())
    return polygons


def join_rings(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One ring (N, 2) of two, there and back along one cut between their nearest corners."""
    distances = ((first[:, None] - second[None]) ** 2).sum(-1)
    i, j = np.unravel_index(distances.argmin(), distances.shape)
    cut = [first[: i + 1], second[j:], second[: j + 1], first[i:]]
    return np.concatenate(cut)


def single_outline(mask: np.ndarray) -> list[float]:
    """One flat polygon of all parts of a mask, which cuts of no width join; empty of an empty
    mask."""
    joined: np.ndarray | None = None
    for polygon in outlines(mask):
        ring = np.reshape(polygon, (-1, 2))
        joined = ring if joined is None else join_rings(joined, ring)
    return [] if joined is None else joined.ravel().tolist()


def _corners(ring: np.ndarray) -> np.ndarray:
    """A ring without the points at which it goes straight on."""
    ring = ring[(ring != np.roll(ring, 1, 0)).any(1)]
    before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
