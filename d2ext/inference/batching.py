"""Images to model outputs in batches, in the order of the images.

detectron2 pads the images of a batch to the size of the largest one, rounded up to what the
backbone divides by. Padding is not neutral: behind a layer with a bias it has values, which reach
into the image. So only images that are padded to the same size by themselves come into one batch.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from d2ext.data.loader import Loader
from d2ext.data.processes import ignore_signals
from d2ext.errors import UserError
from d2ext.inference.records import ImageRecord

from detectron2.data.transforms import AugInput, AugmentationList

logger = logging.getLogger(__name__)

# Of the batch size: how many images are under way at once to be grouped by size.
_WINDOW = 4


class Preparation:
    """Makes a model input of a BGR image.

    Args:
        augmentations: detectron2's, those of a test image.
        image_format: order of the channels that the model takes, "BGR" or "RGB".
    """

    def __init__(self, augmentations: Iterable, image_format: str):
        self._augmentations = AugmentationList(list(augmentations))
        self._image_format = image_format

    def resized(self, image: np.ndarray) -> np.ndarray:
        """The image as the model takes it, (3, H, W), in the type that the augmentations give.

        Args:
            image: uint8 (H, W, 3), BGR.

        Raises:
            UserError: it is not.
        """
        array = isinstance(image, np.ndarray)
        if not array or image.ndim != 3 or image.shape[2] != 3:
            given = image.shape if array else type(image).__name__
            raise UserError(f"the predictor takes a BGR image (H, W, 3), not {given}")
        if image.dtype != np.uint8:  # the mapper refuses such images as well
            raise UserError(
                f"the predictor takes 8 bits per channel (uint8), not {image.dtype}; "
                "scale the values to 0..255 as those of the training images were"
            )
        if self._image_format == "RGB":
            image = image[:, :, ::-1]
        aug_input = AugInput(image)
        self._augmentations(aug_input)
        return np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))


@dataclasses.dataclass
class Decoded:
    """An image that was read, or the reason why it was not.

    Attributes:
        pixels: (3, H, W) for the model.
        size: (height, width) of the image itself.
        image: the image itself, uint8 BGR, if it was asked for.
    """

    record: ImageRecord
    pixels: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    image: np.ndarray | None = None
    error: str | None = None

    def model_input(self) -> dict[str, Any]:
        """detectron2's dict."""
        tensor = torch.from_numpy(self.pixels).float()
        return {"image": tensor, "height": self.size[0], "width": self.size[1]}


@dataclasses.dataclass
class Prediction:
    """What became of one image.

    Attributes:
        output: of the model, e.g. `{"instances": Instances}` in pixels of the image.
        image: uint8 (H, W, 3), BGR, if it was asked for.
        error: why there is no output.
    """

    record: ImageRecord
    output: dict[str, Any] | None = None
    image: np.ndarray | None = None
    error: str | None = None


class Decoding(torch.utils.data.Dataset):
    """Reads records; what cannot be read or prepared becomes an error of that image alone.

    Args:
        prepare: of the predictor.
        keep_images: whether the images themselves are needed afterwards.
    """

    def __init__(self, prepare: Preparation, keep_images: bool):
        self._prepare, self._keep = prepare, keep_images

    def __getitem__(self, record: ImageRecord) -> list[Decoded]:
        shown = dataclasses.replace(record, pixels=None)  # not sent back
        try:
            image = record.read()
            pixels = self._prepare.resized(image)
        except UserError as error:
            return [Decoded(shown, error=str(error))]
        except Exception as error:  # of libraries, about strange images: the others go on
            reason = " ".join(str(error).split()) or type(error).__name__
            return [Decoded(shown, error=f"image '{record.name}' cannot be used: {reason}")]
        kept = image if self._keep else None
        return [Decoded(shown, pixels, image.shape[:2], kept)]


def decode_images(
    records: Iterable[ImageRecord], prepare: Preparation, workers: int, keep_images: bool = False
) -> Iterator[Decoded]:
    """Read images in order, in `workers` processes of their own; 0: in this one."""
    decoding = Decoding(prepare, keep_images)
    if not workers:
        for record in records:
            yield from decoding[record]
        return
    sampler: Any = records  # whatever can be iterated is fine: the keys are the records
    loader = Loader(
        decoding,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=ignore_signals,
    )
    for (item,) in loader:
        yield item


def _as_it_is(item: Any) -> Any:
    return item


def padded_shape(model: Any, pixels: np.ndarray) -> tuple[int, int]:
    """(height, width) that a model pads an image (3, H, W) to when it is alone."""
    step = max(getattr(getattr(model, "backbone", None), "size_divisibility", 0), 1)
    height, width = (-(-side // step) * step for side in pixels.shape[1:])
    return height, width


def predict_in_batches(
    model: Any, decoded: Iterable[Decoded], batch_size: int, window: int | None = None
) -> Iterator[Prediction]:
    """Predictions in the order of the images.

    An image waits until `batch_size` of its padded size are there, or until `window` images are
    under way. What the model cannot do in a batch it is asked to do one by one.

    Args:
        model: detectron2's, in evaluation mode.
        decoded: see `decode_images`.
        batch_size: at least 1.
        window: default: 4 times the batch size.

    Raises:
        UserError: numbers that make no sense.
    """
    window = _WINDOW * batch_size if window is None else window
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; a batch has at least 1 image")
    if window < batch_size:
        raise UserError(f"no batch of {batch_size} images comes of {window} that are under way")
    waiting: dict[tuple[int, int], list[tuple[int, Decoded]]] = {}
    done: dict[int, Prediction] = {}
    places: dict[int, tuple[int, int]] = {}
    following = 0

    def compute(shape: tuple[int, int]) -> None:
        positions, items = zip(*waiting.pop(shape))
        for position in positions:
            del places[position]
        done.update(zip(positions, _predict(model, items)))

    for position, item in enumerate(decoded):
        if item.pixels is None:
            done[position] = Prediction(item.record, error=item.error)
        else:
            shape = places[position] = padded_shape(model, item.pixels)
            waiting.setdefault(shape, []).append((position, item))
            if len(waiting[shape]) == batch_size:
                compute(shape)
        if following in places and position + 1 - following >= window:
            compute(places[following])
        while following in done:
            yield done.pop(following)
            following += 1
    while places:
        compute(places[min(places)])
    while following in done:
        yield done.pop(following)
        following += 1


def _predict(model: Any, items: tuple[Decoded, ...]) -> list[Prediction]:
    try:
        with torch.no_grad():
            outputs = model([item.model_input() for item in items])
    except Exception as error:
        if _is_lasting(error):
            raise
        if len(items) > 1:
            logger.warning("a batch of %d images one by one: %s", len(items), _line(error))
            return [found for item in items for found in _predict(model, (item,))]
        text = f"image '{items[0].record.name}' cannot be predicted: {_line(error)}"
        return [Prediction(items[0].record, error=text)]
    return [Prediction(x.record, output, x.image) for x, output in zip(items, outputs)]


def _is_lasting(error: Exception) -> bool:
    """Whether all images that follow would fail as well: the GPU is lost to this process, or the
    code is wrong rather than the image."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    wrong = (AttributeError, NameError, TypeError, KeyError, AssertionError, NotImplementedError)
    return isinstance(error, wrong) or "CUDA error" in str(error)


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
