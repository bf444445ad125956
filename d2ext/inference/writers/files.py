"""Pictures beside results: the image itself, masks, and pieces of an image."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from d2ext.data.remote import is_address
from d2ext.errors import UserError
from d2ext.inference.results import ImageResult, file_part


def save_picture(pixels: np.ndarray, path: str | Path) -> None:
    """Write a picture, uint8 (H, W), RGB or RGBA.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Image.fromarray(pixels).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def local_file(result: ImageResult) -> str | None:
    """The file that is the image of a result, if it is one here."""
    record = result.record
    alone = record.place and record.span is None and not is_address(record.place)
    return os.path.abspath(record.place) if alone else None


def link_or_save(result: ImageResult, folder: Path) -> Path:
    """A link in a folder to the file of an image, or a PNG of its pixels."""
    source = local_file(result)
    path = folder / f"{result.stem}{os.path.splitext(source)[1] if source else '.png'}"
    if source is None:
        save_picture(_rgb(result), path)
        return path
    try:
        path.unlink(missing_ok=True)
        path.symlink_to(source)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _rgb(result: ImageResult) -> np.ndarray:
    assert result.image is not None, "its writer needs images"
    return np.ascontiguousarray(result.image[:, :, ::-1])


class MaskWriter:
    """`masks/IMAGE/CLASS_NUMBER.png`: one file per object, 255 where it is; `d2ext convert masks`
    reads them."""

    needs_image = False

    def __init__(self, folder: str, names: list[str]):
        self._root, self._names = Path(folder, "masks"), names

    def write(self, result: ImageResult) -> None:
        folder = self._root / result.stem
        folder.mkdir(parents=True, exist_ok=True)  # also without objects: that is known, then
        labels = result.detections.classes.tolist()
        for number, (label, mask) in enumerate(zip(labels, result.masks()), start=1):
            name = f"{file_part(self._names[label])}_{number}.png"
            save_picture(mask.astype(np.uint8) * 255, folder / name)

    def close(self) -> None:
        pass


class CropWriter:
    """`crops/IMAGE_NUMBER_CLASS.png`: the box of each object, transparent around its mask."""

    needs_image = True

    def __init__(self, folder: str, names: list[str]):
        self._root, self._names = Path(folder, "crops"), names
        self._root.mkdir(parents=True, exist_ok=True)

    def write(self, result: ImageResult) -> None:
        found, image = result.detections, _rgb(result)
        height, width = found.size
        masks = result.masks() if found.masks is not None else None
        for number, (label, box) in enumerate(zip(found.classes.tolist(), found.boxes), start=1):
            x0, y0 = np.floor(box[:2]).astype(int).clip(0).tolist()
            x1, y1 = np.ceil(box[2:]).astype(int).tolist()
            piece = image[y0 : min(y1, height), x0 : min(x1, width)]
            if masks is not None and piece.size:
                alpha = masks[number - 1][y0 : min(y1, height), x0 : min(x1, width)]
                piece = np.dstack([piece, alpha.astype(np.uint8) * 255])
            if piece.size:
                name = f"{result.stem}_{number}_{file_part(self._names[label])}.png"
                save_picture(np.ascontiguousarray(piece), self._root / name)

    def close(self) -> None:
        pass
