"""Groups of images that show the same: copies, and pictures saved again in another size, quality or
brightness."""

import os
from collections.abc import Sequence

import cv2
import numpy as np
from tqdm import tqdm

from d2ext.data.check.images import DECODE_ERRORS
from d2ext.errors import UserError

from detectron2.data.detection_utils import read_image

# Of 64 bits, and of 255 on average over the pixels: below both, two pictures show the same.
_BITS, _DIFFERENCE = 6, 8.0
_SMALL = 32  # pixels of the sides of the pictures that are compared


def _signature(path: str) -> tuple[int, np.ndarray]:
    """Perceptual hash (the signs of the 64 lowest frequencies of a small grey picture, see
    Zauner 2010), and that picture with zero mean."""
    try:
        image = read_image(path, "BGR")
    except (*DECODE_ERRORS, ValueError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise UserError(f"image {path} cannot be read: {reason}") from e
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (_SMALL, _SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), small - small.mean()


def duplicate_groups(paths: Sequence[str]) -> np.ndarray:
    """Number of the group of each image, int64 (N,); groups are numbered in the order of their
    first images. Whatever resembles one image of a group belongs to it.

    Raises:
        UserError: an image is missing or damaged.
    """
    found = [_signature(p) for p in tqdm(paths, "images", unit="", leave=False, disable=None)]
    hashes = np.array([h for h, _ in found], np.uint64)
    parents = np.arange(len(paths))
    for i in range(1, len(paths)):
        bits = np.unpackbits((hashes[:i] ^ hashes[i]).view(np.uint8).reshape(i, 8), axis=1).sum(1)
        for j in np.flatnonzero(bits <= _BITS):
            if np.abs(found[i][1] - found[j][1]).mean() < _DIFFERENCE:
                a, b = sorted((parents[i], parents[j]))
                parents[parents == b] = a
    return np.unique(parents, return_inverse=True)[1].reshape(-1)


def image_paths(data: dict, image_root: str) -> list[str]:
    """Files of the images of a COCO file."""
    return [os.path.join(image_root, image["file_name"]) for image in data["images"]]
