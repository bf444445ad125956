"""The masks of one image as bitmaps of their boxes: what boxes, areas, whole bitmaps and semantic
maps are made of without looking at the pixels around the objects.
"""

import math
import mmap
from collections.abc import Sequence

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch

from d2ext.data.check.rle import compressed_runs

from detectron2.structures import BitMasks

_NOTHING = np.zeros((0, 0), np.uint8)


class CroppedMasks:
    """N masks in an image of a size, each cut to its tight box.

    `image_size`: height, width. `boxes`: int64 (N, 4) x0, y0, x1, y1, the last two exclusive, zeros
    for an empty mask. `crops`: a list of uint8 (y1 - y0, x1 - x0) of 0 and 1, or (0, 0). `areas`:
    int64 (N,) in pixels.
    """

    def __init__(self, image_size: tuple[int, int], boxes: np.ndarray, crops: Sequence[np.ndarray]):
        """See the class."""
        self.image_size = image_size
        self.boxes = boxes
        self.crops = list(crops)
        self.areas = np.array([cv2.countNonZero(c) if c.size else 0 for c in crops], np.int64)

    @classmethod
    def around(
        cls,
        image_size: tuple[int, int],
        crops: Sequence[np.ndarray],
        corners: Sequence[tuple[int, int]] | None = None,
    ) -> "CroppedMasks":
        """Cut masks to their tight boxes.

        Args:
            image_size: height, width.
            crops: uint8 (h, w) of 0 and 1.
            corners: x, y in the image of the first pixel of each; by default all are (0, 0).
        """
        boxes, cut = np.zeros((len(crops), 4), np.int64), []
        for i, crop in enumerate(crops):
            x, y, width, height = cv2.boundingRect(crop) if crop.size else (0, 0, 0, 0)
            if width:
                left, top = corners[i] if corners is not None else (0, 0)
                boxes[i] = left + x, top + y, left + x + width, top + y + height
            cut.append(crop[y : y + height, x : x + width] if width else _NOTHING)
        return cls(image_size, boxes, cut)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, keep: np.ndarray) -> "CroppedMasks":
        """Some of the masks.

        Args:
            keep: bool (N,), or int64 rows.
        """
        rows = np.arange(len(self))[keep]
        return CroppedMasks(self.image_size, self.boxes[rows], [self.crops[i] for i in rows])

    def bitmaps(self) -> torch.Tensor:
        """The masks as a bool tensor (N, H, W)."""
        whole = bitmaps_in_new_pages((len(self), *self.image_size))
        bitmaps = whole.numpy().view(np.uint8)
        for bitmap, (x0, y0, x1, y1), crop in zip(bitmaps, self.boxes.tolist(), self.crops):
            bitmap[y0:y1, x0:x1] = crop
        return whole

    def bitmaps_on(self, device: torch.device) -> torch.Tensor:
        """The same on a device, to which the boxes' bitmaps are copied only."""
        height, width = self.image_size
        x0, y0, x1, y1 = self.boxes.T
        rows, owner = y1 - y0, np.repeat(np.arange(len(self)), y1 - y0)
        # Every row of a crop is a run of pixels: where it begins in the crops and in the whole.
        lengths = (x1 - x0)[owner]
        starts = np.cumsum(lengths) - lengths
        within = np.arange(len(owner)) - np.repeat(np.cumsum(rows) - rows, rows)
        shifts = (owner * height + y0[owner] + within) * width + x0[owner] - starts
        pixels = torch.from_numpy(_in_one(self.crops)).to(device)
        runs = torch.from_numpy(np.stack([lengths, shifts])).to(device)
        places = torch.arange(len(pixels), device=device)
        places += torch.repeat_interleave(runs[1], runs[0], output_size=len(pixels))
        whole = torch.zeros((len(self), height, width), dtype=torch.bool, device=device)
        whole.view(-1)[places] = pixels.bool()
        return whole

    def __reduce__(self):
        """Eight pixels in a byte: loading processes hand masks on."""
        pixels = np.packbits(_in_one(self.crops))
        return _unpack, (self.image_size, self.boxes, pixels)

    def paint(self, labels: np.ndarray, values: Sequence[int]) -> None:
        """Set the pixels of masks, one mask after the other.

        Args:
            labels: (H, W), changed.
            values: N labels.
        """
        for value, (x0, y0, x1, y1), crop in zip(values, self.boxes.tolist(), self.crops):
            np.copyto(labels[y0:y1, x0:x1], value, where=crop.view(bool))


def bitmaps_in_new_pages(shape: tuple[int, ...]) -> torch.Tensor:
    """False everywhere, in pages that the system provides when they are first touched: around
    objects, most never are."""
    if not math.prod(shape) or not hasattr(mmap, "MAP_PRIVATE"):  # as on Windows
        return torch.zeros(shape, dtype=torch.bool)
    pages = mmap.mmap(-1, math.prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.bool).view(shape)


def _in_one(crops: Sequence[np.ndarray]) -> np.ndarray:
    """The pixels of all crops, row by row, uint8 (P,)."""
    return np.concatenate([_NOTHING.ravel(), *(c.ravel() for c in crops)])


def _unpack(image_size: tuple[int, int], boxes: np.ndarray, packed: np.ndarray) -> CroppedMasks:
    """Masks from what `CroppedMasks.__reduce__` gives."""
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    ends = np.cumsum(widths * heights)
    pixels = np.unpackbits(packed, count=int(ends[-1]) if len(ends) else 0)
    crops = [
        pixels[end - w * h : end].reshape(h, w) if w else _NOTHING
        for w, h, end in zip(widths.tolist(), heights.tolist(), ends.tolist())
    ]
    return CroppedMasks(image_size, boxes, crops)


class CroppedBitMasks(BitMasks):
    """detectron2's `BitMasks`, drawn when somebody looks at their pixels.

    A loading process hands on the boxes' bitmaps only, and to a GPU no others are copied.
    """

    def __init__(self, masks: CroppedMasks | torch.Tensor):
        """
        Args:
            masks: also whole bitmaps, bool (N, H, W), as `BitMasks.cat` gives.
        """
        if isinstance(masks, CroppedMasks):
            self.cropped, self.image_size = masks, torch.Size(masks.image_size)
        else:
            super().__init__(masks)

    def __getattr__(self, name: str):
        if name != "tensor" or "cropped" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.tensor = self.__dict__.pop("cropped").bitmaps()
        return self.tensor

    def __len__(self) -> int:
        return len(self.cropped if "cropped" in self.__dict__ else self.tensor)

    def to(self, *args, **kwargs) -> BitMasks:
        """As of the base class; the bitmaps of a GPU are drawn there."""
        device = torch.device(args[0] if args else kwargs["device"])
        if "cropped" in self.__dict__ and device.type != "cpu":
            return BitMasks(self.cropped.bitmaps_on(device))
        return super().to(*args, **kwargs)


def join(parts: Sequence[CroppedMasks], order: Sequence[int]) -> CroppedMasks:
    """Masks of one image that were made apart, in one list.

    Args:
        parts: at least one.
        order: the place in the list of each mask of all parts.
    """
    crops = sum((p.crops for p in parts), [])
    boxes = np.concatenate([p.boxes for p in parts])
    rows = np.argsort(order)
    return CroppedMasks(parts[0].image_size, boxes[rows], [crops[i] for i in rows])


def draw_polygons(
    polygons: Sequence[Sequence[np.ndarray]], height: int, width: int
) -> CroppedMasks:
    """Draw polygons by COCO's rule; the same pixels as detectron2's `polygons_to_bitmask`.

    Args:
        polygons: for each object, its polygons as float64 (x0, y0, x1, y1, ...) in pixels. An
            object without any has an empty mask.
        height, width: image size in pixels; parts outside are cut off.
    """
    encoded = mask_util.frPyObjects([p for one in polygons for p in one], height, width)
    rles, place = [], 0
    for one in polygons:
        parts = encoded[place : place + len(one)]
        place += len(one)
        rles.append(parts[0] if len(one) == 1 else mask_util.merge(parts) if parts else None)
    return decode(rles, height, width)


def decode(rles: Sequence[dict | None], height: int, width: int) -> CroppedMasks:
    """Masks from COCO's run-length encoding, decoded inside their boxes only.

    Args:
        rles: valid encodings of masks of this size, compressed or not; None is an empty mask.
        height, width: in pixels.
    """
    counts = [_counts(rle) for rle in rles]
    lengths, owner, place, _ = compressed_runs(counts)
    ends = np.cumsum(lengths)
    ends -= (ends - lengths)[place == 0][np.cumsum(place == 0) - 1] if len(ends) else 0
    inside = (place % 2 == 1) & (lengths > 0)
    lengths, owner, ends = lengths[inside], owner[inside], ends[inside]
    left, top = np.divmod(ends - lengths, height)
    right, bottom = np.divmod(ends - 1, height)
    boxes = np.zeros((len(rles), 4), np.int64)
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    drawn = owner[first]
    if len(first):
        # A run that goes on in the next column covers the last row of one and the first of another.
        wraps = left != right
        boxes[drawn, 0] = left[first]
        boxes[drawn, 1] = np.minimum.reduceat(np.where(wraps, 0, top), first)
        boxes[drawn, 2] = right[np.append(first[1:], len(owner)) - 1] + 1
        boxes[drawn, 3] = np.maximum.reduceat(np.where(wraps, height - 1, bottom), first) + 1
    sizes = boxes[:, 2:] - boxes[:, :2]
    offsets = np.concatenate([[0], np.cumsum(sizes.prod(1))])
    # Where runs begin and end if the crops, column by column, follow each other.
    rows, low = sizes[owner, 1], boxes[owner]
    begin = offsets[owner] + (left - low[:, 0]) * rows + top - low[:, 1]
    end = offsets[owner] + (right - low[:, 0]) * rows + bottom - low[:, 1] + 1
    edges = np.concatenate([[0], np.stack([begin, end], 1).ravel(), offsets[-1:]])
    values = np.zeros(len(edges) - 1, np.uint8)
    values[1::2] = 1
    pixels = np.repeat(values, np.diff(edges))
    crops = []
    for (w, h), start in zip(sizes.tolist(), offsets.tolist()):
        columns = pixels[start : start + w * h].reshape(w, h)
        crops.append(cv2.transpose(columns) if w else _NOTHING)
    return CroppedMasks((height, width), boxes, crops)


def _counts(rle: dict | None) -> bytes:
    if rle is None:
        return b""
    counts = rle["counts"]
    if isinstance(counts, list):
        counts = mask_util.frPyObjects(rle, *rle["size"])["counts"]
    return counts.encode("ascii") if isinstance(counts, str) else counts
