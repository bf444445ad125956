"""What is to be predicted: a record for every image, small enough to list a million of them."""

import dataclasses
import os
from typing import Any

from d2ext.data.remote import is_address
from d2ext.inference.pixels import AnyImage, read_bgr
from d2ext.inference.storage import read_bytes


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image and how to read it.

    Attributes:
        image_id: unique among all that are predicted together.
        name: what it is called in results.
        place: path or address of the file that holds it; "" if the pixels are given.
        span: first byte and number of bytes in a file that holds several.
        pixels: the image itself, see `read_bgr`.
    """

    image_id: int
    name: str
    place: str = ""
    span: tuple[int, int] | None = None
    pixels: Any = None

    def read(self) -> Any:
        """uint8 (H, W, 3), BGR, upright.

        Raises:
            UserError: it cannot be read.
        """
        if not self.place:
            return read_bgr(self.pixels, self.name)
        if self.span is not None or is_address(self.place):
            return read_bgr(read_bytes(self.place, self.span), self.name)
        return read_bgr(self.place)

    def key(self) -> list:
        """What tells it apart from others, as JSON has it."""
        return [self.image_id, self.name, self.place, list(self.span or ())]


def as_record(image: AnyImage | ImageRecord) -> ImageRecord:
    """A record of one image that a program has at hand."""
    if isinstance(image, ImageRecord):
        return image
    if isinstance(image, (str, os.PathLike)):
        return ImageRecord(0, os.fspath(image), os.fspath(image))
    return ImageRecord(0, f"of {type(image).__module__.partition('.')[0]}", pixels=image)
