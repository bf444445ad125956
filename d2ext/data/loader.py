"""A loader whose errors are one line wherever they arise, and which does without a few images that
cannot be read.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from d2ext.errors import UserError

from detectron2.data import DatasetFromList

logger = logging.getLogger(__name__)

_UNREADABLE = "unreadable_images"  # key by which a loading process tells what it replaced
_ATTEMPTS = 10


class UnreadableImageError(UserError):
    """The file of one image or semantic map is missing or damaged."""


class MappedRecords(torch.utils.data.Dataset):
    """Records with their `sample_seed`, mapped; indexed by the pairs of `GlobalBatchSampler`.

    In the place of an image that cannot be read comes another one of its group, which the
    `sample_seed` chooses.
    """

    def __init__(
        self, records: Sequence[dict], mapper: Callable[[dict], dict], groups: Sequence[int]
    ):
        """
        Args:
            records: detectron2's.
            mapper: makes a model input of one.
            groups: group number of each record.
        """
        self._records = DatasetFromList(records, copy=False)  # serialised: every access is a copy
        self._mapper = mapper
        self._groups = np.asarray(groups)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, key):
        index, sample_seed = key
        generator = np.random.default_rng(sample_seed)
        failures: list[str] = []
        while True:
            try:
                out = self._mapper({**self._records[index], "sample_seed": sample_seed})
                return {**out, _UNREADABLE: failures} if failures else out
            except UnreadableImageError as e:
                failures.append(str(e))
                if len(failures) >= _ATTEMPTS:
                    raise UserError(f"{e}; nor can {_ATTEMPTS - 1} others be") from e
            index = int(generator.choice(np.flatnonzero(self._groups == self._groups[index])))


class Loader(torch.utils.data.DataLoader):
    """torch's loader, for batches that are lists of dicts."""

    def __init__(self, *args, max_unreadable: int = 0, **kwargs):
        """
        Args:
            max_unreadable: how many images that cannot be read are replaced, see `MappedRecords`;
                counted in this process, from the start of the iteration.
        """
        super().__init__(*args, **kwargs)
        self._max_unreadable = max_unreadable

    def __iter__(self):
        """Batches.

        Raises:
            UserError: as the mapper; more images than allowed cannot be read.
        """
        seen: set[str] = set()
        try:
            for batch in super().__iter__():
                for item in batch:
                    failures = item.pop(_UNREADABLE, ()) if isinstance(item, dict) else ()
                    for text in failures:
                        self._count(text, seen)
                yield batch
        except UserError as e:
            raise UserError(_original(str(e))) from None

    def _count(self, text, seen):
        if text in seen:
            return
        seen.add(text)
        if len(seen) > self._max_unreadable:
            raise UserError(
                f"{text}; {len(seen)} images cannot be read, at most {self._max_unreadable} are "
                "replaced: find them with tools/check_data.py --thorough"
            )
        logger.warning(
            "%s; another image takes its place (%d of at most %d)",
            text,
            len(seen),
            self._max_unreadable,
        )


def _original(text: str) -> str:
    """The text of an error in a loading process, which torch replaces by its traceback: the last
    line of that is `module.Class: text`."""
    if "\n" not in text.strip():
        return text
    return text.strip().rpartition("\n")[2].partition(": ")[2]
