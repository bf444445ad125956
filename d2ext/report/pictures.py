"""The images of a comparison as data of a page: thumbnails, and outlines that are drawn over them
when they are looked at, within a limit of bytes."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageOps
from tqdm import tqdm

from d2ext.errors import UserError
from d2ext.evaluation import GroundTruth
from d2ext.evaluation.ground_truth import TruthImage
from d2ext.evaluation.predictions import ImageDetections
from d2ext.report.entry import Entry
from d2ext.visualization.overlay import instance_colors

GRID = 512  # outlines have whole coordinates, of so many steps along the longer side
THUMBNAIL_BYTES = 8_000_000  # all of them, as text
OUTLINE_BYTES = 4_500_000
# The lowest scores that are kept; the next one is taken where outlines are too many.
LOWEST_SCORES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
MOST_OBJECTS = 60  # of one model in one image
STAGED_IMAGES = 40  # with the results after each stage
_SIDES = (1024, 768, 640, 512, 448, 384, 320, 256, 224, 192, 160, 128, 96, 64)
_SHADES = 4  # of a class, as many as `instance_colors` has


class Gallery(NamedTuple):
    """What the page's script draws.

    Attributes:
        data: see `build_gallery`.
        lowest: score from which detections are kept.
        side: longer side of the thumbnails at most, in pixels.
        left_out: number of images that are not in it.
    """

    data: dict[str, Any]
    lowest: float
    side: int
    left_out: int


def build_gallery(
    entries: Sequence[Entry],
    truth: GroundTruth,
    records: Sequence[dict],
    quality: np.ndarray,
    most: int = 500,
    thing_colors: Sequence | None = None,
) -> Gallery:
    """Thumbnails and outlines of the images in which models differ most.

    An object is `[class, score, [x, y, width, height], outline]`: the score in thousandths (-1:
    annotated, -2: a crowd region), the box and the outline in steps of `GRID`; an outline is
    rings separated by ";" of numbers: a first point and steps to the next ones.

    Args:
        entries: the models.
        truth, records: of the data set, in the same order.
        quality: (models, images) in [0, 1], nan where there is nothing.
        most: number of images at most.
        thing_colors: RGB in 0..255 of every class; default: as predictions are drawn.

    Raises:
        UserError: an image cannot be read.
    """
    spread = _spread(quality)
    order = np.argsort(-spread, kind="stable")[:most].tolist()
    files = [records[i]["file_name"] for i in order]
    side, thumbnails = _thumbnails(files)
    images = []
    for place, i in enumerate(tqdm(order, desc="outlines", disable=None, leave=False)):
        image = truth.images[i]
        own = [_found(entry.detections[i]) for entry in entries]
        drawn = {
            "name": os.path.basename(files[place]),
            "place": i,
            "width": image.size[1],
            "height": image.size[0],
            "thumbnail": thumbnails[place],
            "truth": _annotated(image, truth),
            "found": own,
            "quality": [None if np.isnan(q) else round(float(q), 3) for q in quality[:, i]],
            "spread": round(float(spread[i]), 4),
        }
        if place < STAGED_IMAGES:
            drawn["stages"] = {
                number: [_found(stage[i]) for stage in entry.stages[:-1]]
                for number, entry in enumerate(entries)
                if entry.stages
            }
        images.append(drawn)
    lowest, kept = _within_limit(images)
    shades = [
        [_hex(c) for c in instance_colors([label] * _SHADES, thing_colors)]
        for label in range(len(truth.class_names))
    ]
    data = {
        "classes": list(truth.class_names),
        "shades": shades,
        "models": [entry.name for entry in entries],
        "grid": GRID,
        "lowest": lowest,
        "images": images[:kept],
    }
    return Gallery(data, lowest, side, len(truth.images) - kept)


def _spread(quality: np.ndarray) -> np.ndarray:
    """How much the models differ in each image; of a single one, how bad it is."""
    known = np.nan_to_num(quality, nan=1.0)
    return known.max(axis=0) - known.min(axis=0) if len(known) > 1 else 1 - known[0]


def _hex(color: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in color)


def _thumbnails(files: Sequence[str]) -> tuple[int, list[str]]:
    """The largest side at which all thumbnails stay within the limit, and the thumbnails."""
    probe = files[:: max(len(files) // 12, 1)]
    sides = list(_SIDES)
    while len(sides) > 1:
        mean = np.mean([len(_thumbnail(file, sides[0])) for file in probe] or [0])
        if mean * len(files) <= 0.9 * THUMBNAIL_BYTES:
            break
        sides.pop(0)
    for side in sides:
        made, total = [], 0
        for file in tqdm(files, desc="thumbnails", unit="img", disable=None, leave=False):
            made.append(_thumbnail(file, side))
            total += len(made[-1])
        if total <= THUMBNAIL_BYTES:
            break
    return side, made


def _thumbnail(file: str, side: int) -> str:
    """A JPEG of at most `side` pixels as an address."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a photograph is not decoded in full
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {file}: {' '.join(str(error).split())}") from error
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    quality = 90 if max(small.size) <= 256 else 80
    small.save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _annotated(image: TruthImage, truth: GroundTruth) -> list[list]:
    objects = []
    for annotation in image.annotations:
        rle = truth.rle(image, annotation) if annotation["segmentation"] else None
        x, y, width, height = annotation["bbox"]
        box = np.array([x, y, x + width, y + height])
        score = -2 if annotation["iscrowd"] else -1
        objects.append(_object(annotation["label"], score, box, rle, image.size))
    return objects


def _found(own: ImageDetections | None) -> list[list]:
    """The best detections, by descending score."""
    if own is None:
        return []
    order = np.argsort(-own.scores, kind="stable")[:MOST_OBJECTS]
    rles = own.rles()
    return [
        _object(
            int(own.classes[i]),
            int(1000 * own.scores[i]),
            own.boxes[i],
            rles[i] if rles else None,
            own.size,
        )
        for i in order
        if own.scores[i] >= LOWEST_SCORES[0]
    ]


def _object(label: int, score: int, box: np.ndarray, rle: dict | None, size) -> list:
    scale = GRID / max(size)
    x0, y0, x1, y1 = (round(float(v) * scale) for v in box)
    return [label, score, [x0, y0, x1 - x0, y1 - y0], outline(rle, scale) if rle else ""]


def outline(rle: dict, scale: float) -> str:
    """The rings of a mask, those of holes included: to be filled by the even-odd rule.

    Args:
        rle: of the mask.
        scale: steps of the outline in a pixel.
    """
    x0, y0, width, height = (int(v) for v in mask_util.toBbox(rle))
    if not width or not height:
        return ""
    mask = np.pad(mask_util.decode(rle)[y0 : y0 + height, x0 : x0 + width], 1)
    size = max(round(mask.shape[1] * scale), 3), max(round(mask.shape[0] * scale), 3)
    way = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
    soft = cv2.resize(mask.astype(np.float32), size, interpolation=way)
    drawn = (soft > min(0.5, 0.5 * float(soft.max()))).astype(np.uint8)
    rings = cv2.findContours(drawn, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[-2]
    steps = np.array([size[0] / mask.shape[1], size[1] / mask.shape[0]])
    texts = []
    for ring in sorted(rings, key=len, reverse=True):
        points = cv2.approxPolyDP(ring, max(1.0, 0.45 * scale), True)[:, 0]  # of half a pixel
        if len(points) < 3 and texts:
            continue
        places = ((points + 0.5) / steps + (x0 - 1, y0 - 1)) * scale
        whole = np.rint(places).astype(int)
        moves = np.diff(whole, axis=0, prepend=np.zeros((1, 2), int))
        texts.append(" ".join(map(str, moves.ravel().tolist())))
    return ";".join(texts)


def _within_limit(images: list[dict]) -> tuple[float, int]:
    """Leave out detections of low scores, then images, until the outlines fit.

    Returns:
        The lowest score that is left, and the number of images.
    """
    for lowest in LOWEST_SCORES:
        for image in images:
            groups = [image["found"], *image.get("stages", {}).values()]
            for group in groups:
                group[:] = [[x for x in own if x[1] >= 1000 * lowest] for own in group]
        sizes = [_outline_size(image) for image in images]
        if sum(sizes) <= OUTLINE_BYTES:
            return lowest, len(images)
    return lowest, int(np.searchsorted(np.cumsum(sizes), OUTLINE_BYTES, side="right"))


def _outline_size(image: dict) -> int:
    """About so many bytes of objects an image has."""
    groups = [[image["truth"]], image["found"], *image.get("stages", {}).values()]
    return sum(30 + len(x[3]) for group in groups for own in group for x in own)
