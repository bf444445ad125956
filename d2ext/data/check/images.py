"""What may be wrong with an image file or a semantic map, seen in its header; thoroughly: in its
pixels. detectron2's reader applies the EXIF orientation, so sizes are those of the picture shown.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from d2ext.data.check.problems import Finding

from detectron2.utils.file_io import PathManager

_EXIF_ORIENTATION = 274
# What Pillow raises for damaged files of one format or another.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Modes whose conversion to 8 bits per channel would clip the values.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_THREADS = 4  # hide the latency of network file systems


class ImageFile(NamedTuple):
    """An image to check: its path, the size that the annotations state, its semantic map."""

    path: str
    width: int
    height: int
    map_path: str | None = None


def unsupported_mode(mode: str) -> str | None:
    """Why an image of a Pillow mode cannot be used, or None."""
    if mode in _DEEP_MODES:
        return f"has mode {mode}, more than 8 bits per pixel; convert it to 8 bits"
    return None


def _orientation(image, thorough: bool) -> int:
    """EXIF orientation, 1 if there is none; a PNG that states it after its pixels is decoded for it
    only in the thorough check."""
    if image.format == "PNG" and "exif" not in image.info and not thorough:
        return 1
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data, which detectron2 ignores as well
        return 1


def _reason(error: BaseException, path: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no image file" if os.path.getsize(path) else "is an empty file"
    return f"cannot be read: {' '.join(str(error).split())}"


class ImageHeader(NamedTuple):
    """Pillow mode, (width, height) of the picture as shown, EXIF orientation (1: none)."""

    mode: str
    size: tuple[int, int]
    orientation: int


def read_header(path: str, thorough: bool = False) -> ImageHeader:
    """Header of an image file; thoroughly: decode the pixels as well.

    Raises:
        DECODE_ERRORS: the file is missing or damaged.
    """
    with PathManager.open(path, "rb") as f, Image.open(f) as image:
        orientation = _orientation(image, thorough)
        size = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        if thorough:
            image.load()
        return ImageHeader(image.mode, size, orientation)


def image_finding(path: str, width: int, height: int, thorough: bool = False) -> Finding | None:
    """What is wrong with an image file whose annotations say width x height, if anything."""
    try:
        mode, size, orientation = read_header(path, thorough)
    except DECODE_ERRORS as e:
        kind = "image-missing" if isinstance(e, FileNotFoundError) else "image-unreadable"
        return Finding("error", kind, _reason(e, path))
    if unsupported_mode(mode):
        return Finding("error", "image-mode", unsupported_mode(mode))
    if size != (width, height):
        text = f"is {size[0]}x{size[1]}, but {width}x{height} in the annotations"
        if orientation in (5, 6, 7, 8) and size == (height, width):
            text += " (its EXIF orientation turns it; annotate it as shown, or remove the EXIF)"
        return Finding("error", "image-size-differs", text)
    if orientation in range(2, 9):
        text = f"has EXIF orientation {orientation}: it is turned, its annotations have to fit that"
        return Finding("warning", "image-orientation", text)
    if mode in ("RGBA", "LA", "PA"):
        return Finding("warning", "image-alpha", "has an alpha channel, which is ignored")
    return None


def map_finding(path: str, width: int, height: int, thorough: bool = False) -> Finding | None:
    """What is wrong with the semantic map of an image of width x height, if anything."""
    try:
        mode, size, _ = read_header(path, thorough)
    except DECODE_ERRORS as e:
        kind = "map-missing" if isinstance(e, FileNotFoundError) else "map-unreadable"
        return Finding("error", kind, _reason(e, path))
    if mode != "L":
        text = f"has mode {mode}; it must be an 8-bit greyscale PNG"
        return Finding("error", "map-mode", text)
    if size != (width, height):
        text = f"is {size[0]}x{size[1]}, its image {width}x{height}"
        return Finding("error", "map-size", text)
    return None


def file_findings(
    files: Sequence[ImageFile], thorough: bool = False
) -> Iterator[tuple[int, Finding]]:
    """Findings of many images and their maps, as (index, finding), with a progress bar."""

    def check(file):
        found = [image_finding(file.path, file.width, file.height, thorough)]
        if file.map_path:
            finding = map_finding(file.map_path, file.width, file.height, thorough)
            if finding:
                text = f"has the semantic map {file.map_path}, which {finding.text}"
                found.append(finding._replace(text=text))
        return [f for f in found if f]

    Image.init()  # not safe to be done by several threads at once
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(check, files)
        bar = tqdm(results, "images", total=len(files), unit="", delay=2, leave=False, disable=None)
        for index, found in enumerate(bar):
            for finding in found:
                yield index, finding
