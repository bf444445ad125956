"""Pixels of whatever an image is given as: array, file, encoded bytes, PIL image or tensor."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from d2ext.data.check.images import DECODE_ERRORS
from d2ext.errors import UserError

from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image

AnyImage = np.ndarray | torch.Tensor | str | os.PathLike | bytes | Image.Image


def read_bgr(image: AnyImage, name: str | None = None) -> Any:
    """An image as detectron2 reads it: upright as its EXIF orientation says, BGR.

    Args:
        image: path of a file; bytes of one; a PIL image; a tensor, uint8 (3, H, W), RGB, as
            torchvision reads it; anything else is given back as it is.
        name: for messages; default: the path.

    Returns:
        uint8 (H, W, 3) of the first four.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if isinstance(image, (str, os.PathLike)):
            return read_image(os.fspath(image), "BGR")
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        if isinstance(image, Image.Image):
            return convert_PIL_to_numpy(ImageOps.exif_transpose(image), "BGR")
    # ValueError: truncated headers of some formats.
    except (*DECODE_ERRORS, ValueError) as error:
        if name is None:
            name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "of PIL"
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose text has the address of an object
            reason = "it is of no kind that Pillow knows"
        raise UserError(f"image '{name}' cannot be read: {reason}") from error
    return _from_tensor(image) if isinstance(image, torch.Tensor) else image


def _from_tensor(image: torch.Tensor) -> np.ndarray:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise UserError(
            "the predictor takes a tensor (3, H, W) of uint8, RGB, not "
            f"{tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
        )
    return np.ascontiguousarray(image.cpu().numpy()[::-1].transpose(1, 2, 0))
