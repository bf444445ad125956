"""What may be wrong with an image file or a semantic map, seen in its header; thoroughly: in its
pixels. detectron2's reader applies the EXIF orientation, so sizes are those of the picture shown.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
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


def unsupported(header: "ImageHeader") -> str | None:
    """Why an image cannot be used, or None."""
    if header.mode in _DEEP_MODES:
        return f"has mode {header.mode}, more than 8 bits per pixel; convert it to 8 bits"
    if header.format == "TIFF" and header.orientation in range(2, 9):
        # Pillow turns it while decoding, and detectron2 after that.
        text = f"is a TIFF of orientation {header.orientation}, which would be turned twice"
        return f"{text}; save it turned"
    return None


def _few_bits(path: str) -> str | None:
    """Why the values of an image with 16 bits per channel cannot be used, or None: the high byte is
    taken, which is almost black where a camera fills 12 bits from below."""
    with PathManager.open(path, "rb") as f, Image.open(f) as image:
        highest = max(high for _, high in np.atleast_2d(image.getextrema())[:3])
    if 0 < highest < 16:
        return (
            f"has 16 bits per channel, but values below {256 * (highest + 1)} only; scale them up"
        )
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
    """Pillow mode and format, (width, height) of the picture as shown, EXIF orientation (1: none),
    whether the file has 16 bits per channel."""

    mode: str
    format: str
    size: tuple[int, int]
    orientation: int
    deep: bool


# The last bytes of a whole file.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}


def _may_be_cut(f, format) -> bool:
    """Whether a file of JPEG or PNG lacks its end; with something behind its end it lacks nothing,
    which decoding it tells. Leaves the position where it was."""
    end = _ENDS.get(format)
    if end is None:
        return False
    position = f.tell()
    f.seek(-len(end), os.SEEK_END)
    cut = f.read() != end
    f.seek(position)
    return cut


def read_header(path: str, thorough: bool = False) -> ImageHeader:
    """Header of an image file. Its pixels are decoded as well if asked for (thorough), or if the
    end of the file is missing.

    Raises:
        DECODE_ERRORS: the file is missing or damaged.
    """
    with PathManager.open(path, "rb") as f, Image.open(f) as image:
        format, mode = image.format or "", image.mode
        orientation = _orientation(image, thorough)
        turned = orientation in (5, 6, 7, 8) and format != "TIFF"  # there Pillow did it
        size = image.size[::-1] if turned else image.size
        deep = ";16" in str([tile[3] for tile in image.tile])
        if thorough or _may_be_cut(f, format):
            image.load()
        if thorough and format == "PNG":  # decoding does not look at the checksums
            f.seek(0)
            Image.open(f).verify()
        return ImageHeader(mode, format, size, orientation, deep)


def image_finding(path: str, width: int, height: int, thorough: bool = False) -> Finding | None:
    """What is wrong with an image file whose annotations say width x height, if anything."""
    try:
        header = read_header(path, thorough)
        reason = unsupported(header) or (_few_bits(path) if header.deep else None)
    except DECODE_ERRORS as e:
        kind = "image-missing" if isinstance(e, FileNotFoundError) else "image-unreadable"
        return Finding("error", kind, _reason(e, path))
    if reason:
        return Finding("error", "image-mode", reason)
    mode, size, orientation = header.mode, header.size, header.orientation
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
        header = read_header(path, thorough)
        mode, size = header.mode, header.size
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
