"""One batch that is computed in parts, one after the other, as gradient accumulation does.

The losses of this collection are sums divided by counts over the whole batch, and images are padded
to the largest one of it. A part by itself knows neither, so the counts of all parts are measured
before their losses are computed; the gradients of the parts then add up to that of the batch.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_CURRENT: ContextVar["BatchInParts | None"] = ContextVar("batch_in_parts", default=None)


class BatchInParts:
    """What the parts of one batch have in common.

    Args:
        batch: the inputs of the whole batch.
        number: of parts of equal length.

    Attributes:
        parts: lists of inputs.
    """

    def __init__(self, batch: list[dict], number: int):
        size = len(batch) // number
        self.parts = [batch[i * size : (i + 1) * size] for i in range(number)]
        shapes = [x["image"].shape[-2:] for x in batch if torch.is_tensor(x.get("image"))]
        self._largest = [max((s[i] for s in shapes if len(s) == 2), default=0) for i in (0, 1)]
        self._counts: list[list[Tensor]] = []
        self._next: Iterator[Tensor] | None = None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Note the counts of one part while a `with` block lasts; for each part, in order."""
        self._counts.append([])
        yield from self._as_current(None)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Give one part the counts of all while a `with` block lasts."""
        means = [torch.stack(counts).mean(0) for counts in zip(*self._counts, strict=True)]
        yield from self._as_current(iter(means))

    @property
    def has_counts(self) -> bool:
        """Whether the losses of the network have counts, as far as was measured."""
        return any(self._counts)

    def _as_current(self, counts: Iterator[Tensor] | None) -> Iterator[None]:
        self._next = counts
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def share(self, count: Tensor) -> Tensor:
        """Note a count, or give the mean of what all parts noted in this place."""
        if self._next is None:
            self._counts[-1].append(count)
            return count
        return next(self._next)

    def padded(self, height: int, width: int, divisor: int) -> tuple[int, int]:
        """Size to pad a part to, that of the batch; see `padded_size`."""
        own, step = (height, width), max(divisor, 1)
        sizes = [max(a, -(-b // step) * step) for a, b in zip(own, self._largest)]
        return sizes[0], sizes[1]


def number_of_parts() -> int:
    """Into how many parts the current batch is cut in this process."""
    current = _CURRENT.get()
    return len(current.parts) if current else 1


def measured_count() -> Tensor | None:
    """The next count of the whole batch, if it has been measured."""
    current = _CURRENT.get()
    return current.share(torch.zeros(())) if current and current._next is not None else None


def note_count(count: Tensor) -> Tensor:
    """Note a count of the current part, if there is one; the count itself."""
    current = _CURRENT.get()
    return current.share(count) if current else count


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """The size that images of a part are padded to.

    Args:
        height, width: what they need by themselves, in pixels.
        divisor: sides of the whole batch are rounded up to a multiple of it; 0: they are not.
    """
    current = _CURRENT.get()
    return current.padded(height, width, divisor) if current else (height, width)
