"""Train and test loaders. The training stream is one global, seeded sequence of batches: it does
not depend on the number of processes or workers, and it can start at any iteration.
"""

import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from d2ext.data.catalog import check_registered, describe_records
from d2ext.data.copy_paste import CopyPaste
from d2ext.data.loader import Adapted, Loader, MappedRecords
from d2ext.data.processes import ignore_signals
from d2ext.errors import UserError

from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    trivial_batch_collator,
    worker_init_reset_seed,
)
from detectron2.utils import comm

logger = logging.getLogger(__name__)


def get_dataset_records(names: str | Sequence[str], filter_empty: bool = False) -> list[dict]:
    """Records of one or several registered data sets, in detectron2's format.

    Args:
        names: registered names.
        filter_empty: leave out images without any non-crowd annotation.

    Raises:
        UserError: unknown name (with the nearest known ones), files missing, nothing left.
    """
    names = check_registered(names)
    try:
        records = get_detection_dataset_dicts(names, filter_empty=False)
    except AssertionError as e:  # detectron2's "Dataset 'x' is empty!"
        raise UserError(" ".join(str(e).split())) from e
    kept = _filter_records(records, filter_empty, ", ".join(names))
    left_out = f"; {len(records) - len(kept)} without objects left out" * (len(kept) < len(records))
    classes = MetadataCatalog.get(names[0]).get("thing_classes") or ()
    logger.info("data %s: %s%s", ", ".join(names), describe_records(kept, classes), left_out)
    return kept


def _filter_records(records, filter_empty, name):
    if filter_empty and all("annotations" in r for r in records):
        kept = filter_images_with_only_crowd_annotations(records)
        if records and not kept:
            raise UserError(
                f"data set {name}: no image has a usable annotation; check the annotation file or "
                "set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
            )
        records = kept
    if not records:
        raise UserError(f"data set {name} is empty")
    return records


def _resolve(dataset, filter_empty):
    """Records of names or of a list of records."""
    if isinstance(dataset, str) or (len(dataset) and isinstance(dataset[0], str)):
        return get_dataset_records(dataset, filter_empty)
    return _filter_records(list(dataset), filter_empty, "given as records")


def _position_seed(seed, position):
    """63-bit seed of one position of the training stream."""
    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class GlobalBatchSampler(torch.utils.data.Sampler):
    """This process's share of an endless sequence of global batches.

    The images of an epoch are a permutation drawn from (seed, epoch). With groups, an image waits
    until its group has a full batch, across epoch borders, as in detectron2's
    `AspectRatioGroupedDataset`; but all processes form the same global batches.

    Yields lists of (index, sample_seed); `sample_seed` is a function of (seed, stream position).
    """

    def __init__(
        self,
        groups: Sequence[int],
        total_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_iter: int = 0,
    ):
        """
        Args:
            groups: group number of each image; all equal for no grouping.
            total_batch_size: images of one batch over all processes.
            seed: non-negative.
            rank, world_size: this process takes images rank, rank + world_size, ... of each batch.
            start_iter: number of global batches to skip.
        """
        if total_batch_size <= 0 or total_batch_size % world_size:
            raise UserError(
                f"total batch size {total_batch_size} (SOLVER.IMS_PER_BATCH) must be a positive "
                f"multiple of the number of processes, {world_size}"
            )
        if not len(groups):
            raise UserError("the training data set is empty")
        self.groups = np.asarray(groups)
        self.total_batch_size = total_batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.start_iter = start_iter

    def _positions(self):
        """Endless (position, index) pairs of the stream."""
        position = 0
        for epoch in itertools.count():
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.groups))
            for index in order.tolist():
                yield position, index
                position += 1

    def _global_batches(self):
        waiting = {}
        for position, index in self._positions():
            batch = waiting.setdefault(int(self.groups[index]), [])
            batch.append((position, index))
            if len(batch) == self.total_batch_size:
                yield batch[:]
                batch.clear()

    def __iter__(self):
        for batch in itertools.islice(self._global_batches(), self.start_iter, None):
            share = batch[self.rank :: self.world_size]
            yield [(index, _position_seed(self.seed, position)) for position, index in share]


def _aspect_groups(records):
    """0 for landscape and 1 for portrait or square images, as detectron2 groups them."""
    groups = []
    for record in records:
        if "width" not in record or "height" not in record:
            raise UserError(
                f"{record.get('file_name', 'a record')} has no width and height; add them or set "
                "DATALOADER.ASPECT_RATIO_GROUPING False"
            )
        groups.append(0 if record["width"] > record["height"] else 1)
    return groups


def _init_training_worker(worker_id):
    ignore_signals(worker_id)
    worker_init_reset_seed(worker_id)


def build_train_loader(
    dataset: str | Sequence[str] | Sequence[dict],
    *,
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    aspect_ratio_grouping: bool = True,
    filter_empty: bool = True,
    start_iter: int = 0,
    max_unreadable: int = 10,
    copy_paste: CopyPaste | None = None,
) -> torch.utils.data.DataLoader:
    """Endless training loader over a global, seeded stream of batches.

    N processes see exactly the images that one process with the same total batch size would see,
    and `start_iter=k` continues where k iterations ended, without loading the skipped images.

    Args:
        dataset: registered name(s), or a list of records.
        mapper: makes a model input of a record, which also holds `sample_seed`.
        total_batch_size: images of one iteration over all processes.
        num_workers: loading processes; the result does not depend on it.
        seed: of order and augmentation. Negative: a random one, agreed upon by all processes.
        aspect_ratio_grouping: landscape images in one batch, portrait and square ones in another.
        filter_empty: leave out images without any non-crowd annotation.
        start_iter: first iteration.
        max_unreadable: images whose files are damaged in the middle of a training are named and
            replaced by others, up to so many in each process.
        copy_paste: pastes objects of one image into another one after the mapper.

    Returns:
        yields list[dict] of length total_batch_size / number of processes.

    Raises:
        UserError: unknown or empty data set, batch not divisible by the number of processes.
    """
    records = _resolve(dataset, filter_empty)
    groups = _aspect_groups(records) if aspect_ratio_grouping else [0] * len(records)
    sampler = GlobalBatchSampler(
        groups,
        total_batch_size,
        seed if seed >= 0 else comm.shared_random_seed(),
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        start_iter=start_iter,
    )
    return Loader(
        MappedRecords(records, mapper, groups, copy_paste),
        max_unreadable=max_unreadable,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=_init_training_worker,
        # Without its own generator the loader would draw from the global one.
        generator=torch.Generator().manual_seed(max(seed, 0)),
    )


def build_test_loader(
    dataset: str | Sequence[str] | Sequence[dict],
    *,
    mapper: Callable[[dict], dict],
    num_workers: int = 0,
) -> torch.utils.data.DataLoader:
    """detectron2's test loader: every image once, batches of one, split over the processes.

    Args:
        dataset: registered name(s), or a list of records.
        mapper: makes a model input of a record.
        num_workers: loading processes.
    """
    records = _resolve(dataset, filter_empty=False)
    plain = build_detection_test_loader(records, mapper=mapper, num_workers=num_workers)
    return Loader(
        Adapted(plain.dataset),
        batch_sampler=plain.batch_sampler,
        num_workers=num_workers,
        collate_fn=plain.collate_fn,
        worker_init_fn=ignore_signals,
    )
