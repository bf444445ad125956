"""A loader whose errors are one line wherever they arise, and which does without a few images that
cannot be read.
"""

import logging
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from d2ext.data.copy_paste import CopyPaste
from d2ext.data.processes import signals_later, starting_all_or_none
from d2ext.errors import UserError

from detectron2.data import DatasetFromList

logger = logging.getLogger(__name__)

_UNREADABLE = "unreadable_images"  # key by which a loading process tells what it replaced
_ATTEMPTS = 10
_PASTING = 1  # sets what copy-paste draws apart from the other numbers of a `sample_seed`


class UnreadableImageError(UserError):
    """The file of one image or semantic map is missing or damaged."""


class MappedRecords(torch.utils.data.Dataset):
    """Records with their `sample_seed`, mapped; indexed by the pairs of `GlobalBatchSampler`.

    In the place of an image that cannot be read comes another one of its group, which the
    `sample_seed` chooses; as it does the image whose objects are pasted, and which of them.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        groups: Sequence[int],
        copy_paste: CopyPaste | None = None,
    ):
        """
        Args:
            records: detectron2's.
            mapper: makes a model input of one.
            groups: group number of each record.
            copy_paste: pastes objects of one mapped record into another one.
        """
        self._copy_paste = copy_paste if copy_paste is not None and copy_paste.prob else None
        sources = [_has_objects(r) for r in records] if self._copy_paste is not None else []
        self._sources = np.flatnonzero(sources)
        self._records = DatasetFromList(records, copy=False)  # serialised: every access is a copy
        self._mapper = mapper
        self._groups = np.asarray(groups)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, key):
        index, sample_seed = key
        failures: list[str] = []
        others = np.flatnonzero(self._groups == self._groups[index])
        out = self._map(index, sample_seed, others, failures)
        if self._copy_paste is not None and len(self._sources):
            generator = np.random.default_rng((sample_seed, _PASTING))
            if generator.random() < self._copy_paste.prob:
                source_seed = int(generator.integers(2**63))
                index = int(generator.choice(self._sources))
                source = self._map(index, source_seed, self._sources, failures)
                out = self._copy_paste(out, source, generator)
        return {**out, _UNREADABLE: failures} if failures else out

    def _map(self, index, sample_seed, others, failures):
        """A record, or one of `others` in its place; what cannot be read is added to `failures`."""
        generator = np.random.default_rng(sample_seed)
        tried = 0
        while True:
            try:
                return self._mapper({**self._records[index], "sample_seed": sample_seed})
            except UnreadableImageError as e:
                failures.append(str(e))
                tried += 1
                if tried == _ATTEMPTS:
                    raise UserError(f"{e}; nor can {_ATTEMPTS - 1} others be") from e
            index = int(generator.choice(others))


def _has_objects(record):
    return any(not a.get("iscrowd", 0) for a in record.get("annotations", ()))


class Adapted(torch.utils.data.Dataset):
    """A map-style data set as it is. A loading process that shares nothing with this one, as on
    macOS, meets d2ext first, which makes what is inside importable."""

    def __init__(self, dataset: torch.utils.data.Dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, key):
        return self._dataset[key]


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
        self._open = weakref.WeakSet()

    def __iter__(self):
        """Batches.

        Raises:
            UserError: as the mapper; more images than allowed cannot be read.
        """
        with signals_later(), starting_all_or_none():
            loaded = super().__iter__()
            self._open.add(loaded)
        return self._batches(loaded)

    def close(self) -> None:
        """End the loading processes.

        They ignore SIGTERM, by which a process that multiprocessing has started would end them: it
        would wait for them forever.
        """
        for loaded in list(self._open):
            _end(loaded)

    def _batches(self, loaded):
        seen: set[str] = set()
        try:
            for batch in loaded:
                for item in batch:
                    failures = item.pop(_UNREADABLE, ()) if isinstance(item, dict) else ()
                    for text in failures:
                        self._count(text, seen)
                yield batch
        except UserError as e:
            raise UserError(_original(str(e))) from None
        finally:
            # Not left to `__del__`: what a traceback refers to may live as long as the process.
            _end(loaded)

    def _count(self, text, seen):
        if text in seen:
            return
        seen.add(text)
        if len(seen) > self._max_unreadable:
            raise UserError(
                f"{text}; {len(seen)} images cannot be read, at most {self._max_unreadable} are "
                "replaced: find them with d2ext check --thorough"
            )
        logger.warning(
            "%s; another image takes its place (%d of at most %d)",
            text,
            len(seen),
            self._max_unreadable,
        )


def _end(loaded) -> None:
    """End the loading processes of torch's iterator, if it has any."""
    with signals_later():
        getattr(loaded, "_shutdown_workers", lambda: None)()
        for process in getattr(loaded, "_workers", ()):  # where a signal has stopped torch's way
            process.kill()
            process.join()


def _original(text: str) -> str:
    """The text of an error in a loading process, which torch replaces by its traceback: the last
    line of that is `module.Class: text`."""
    if "\n" not in text.strip():
        return text
    return text.strip().rpartition("\n")[2].partition(": ")[2]
