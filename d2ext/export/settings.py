"""What an exported file says about itself, so that it is used without a config."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from d2ext.errors import UserError

_PREFIX = "d2ext."


class FileSettings(NamedTuple):
    """
    Attributes:
        network: class of the model, for people.
        class_names: of the classes.
        channel_order: "BGR" or "RGB" of the input.
        short_edge, max_size: images are resized so that the shorter side is `short_edge` pixels,
            but the longer one `max_size` at most.
        pixel_mean, pixel_std: by which the program normalises; not to be done before it.
        drawing, mask_threshold: how masks come into the image, see `d2ext.export.drawing`.
        stages: number of results in the file; more than 1 only if it was exported with them.
        parameters: learnable values of the model.
        checkpoint, sha256: name and digest of the weights.
        version, torch: of d2ext and of PyTorch.
    """

    network: str
    class_names: list[str]
    channel_order: str
    short_edge: int
    max_size: int
    pixel_mean: list[float]
    pixel_std: list[float]
    drawing: str
    mask_threshold: float
    stages: int
    parameters: int
    checkpoint: str
    sha256: str
    version: str
    torch: str

    def to_texts(self) -> dict[str, str]:
        """As `metadata_props` of ONNX: `d2ext.NAME` -> JSON."""
        return {_PREFIX + name: json.dumps(value) for name, value in self._asdict().items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], path: str) -> "FileSettings":
        """The settings in the `metadata_props` of a file.

        Raises:
            UserError: it was not written by d2ext, or by an incompatible version.
        """
        values: dict[str, Any] = {}
        try:
            for name in cls._fields:
                values[name] = json.loads(texts[_PREFIX + name])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path} holds no settings of d2ext ({' '.join(str(error).split())}); export it "
                "with d2ext export"
            ) from error
        return cls(**values)
