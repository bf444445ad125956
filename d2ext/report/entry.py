"""What a comparison knows about one model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from d2ext.evaluation.predictions import ImageDetections

Detections = Sequence[ImageDetections | None]  # by image of the ground truth


class Speed(NamedTuple):
    """How fast a model predicts, one image at a time."""

    seconds: float  # median of an image, from the decoded image to its masks
    memory: int | None  # bytes at most: of the GPU, else of the whole process; None: not known
    device: str


class Entry(NamedTuple):
    """One model, or a file of saved predictions.

    Attributes:
        name: unique among those that are compared.
        detections: what it found.
        stages: what it would have found if it ended after its first, second, ... stage; the last
            one is the whole model. Empty for a model without stages.
        parameters: number of learnable values; None for saved predictions.
        speed: None for saved predictions.
        curve: lines of the run's `metrics.json`.
        facts: (what, value) for people: where it comes from, how it was trained.
        about: one sentence.
        command: that trained it, as it can be typed.
    """

    name: str
    detections: Detections
    stages: Sequence[Detections] = ()
    parameters: int | None = None
    speed: Speed | None = None
    curve: Sequence[dict[str, Any]] = ()
    facts: Sequence[tuple[str, str]] = ()
    about: str = ""
    command: str = ""

    def has_masks(self) -> bool:
        """Whether there are masks; True where nothing was found at all."""
        found = [x for x in self.detections if x is not None and len(x.scores)]
        return all(x.masks is not None for x in found)
