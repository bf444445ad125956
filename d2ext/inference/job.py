"""A job: the predictions for many images in a folder that any number of processes fill together,
and that can be interrupted at any moment.

The images are cut into shards of consecutive ones. A shard is computed by one process and becomes
one Parquet file, which is there as a whole or not at all; what a process had of others is computed
again. Batches do not reach over shards, so that a result does not depend on interruptions.

    job.json                 what is predicted, and with what; compared when a job is continued
    parts/part-00000.parquet a row per image, see `d2ext.inference.table`
    coco.json, failed.json   of all parts, when the last one is there
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from d2ext.errors import UserError
from d2ext.evaluation.predictions import collect
from d2ext.inference import table
from d2ext.inference.batching import Prediction
from d2ext.inference.records import ImageRecord
from d2ext.inference.results import above_threshold, category_ids
from d2ext.inference.sources import Source
from d2ext.inference.storage import (
    file_system,
    is_address,
    list_folder,
    place_below,
    read_bytes,
    write_bytes,
)
from d2ext.inference.writers.coco import CocoFile

SHARD_SIZE = 500
MANIFEST, PARTS, MERGED, FAILED = "job.json", "parts", "coco.json", "failed.json"
# What is compared, and how it is called.
_COMPARED = {
    "inputs": "images",
    "weights": "weights",
    "config": "config or overrides",
    "threshold": "confidence threshold",
    "classes": "names of classes",
    "shard_size": "shard size",
    "version": "version of d2ext's jobs",
}

logger = logging.getLogger(__name__)


class Merged(NamedTuple):
    """Counts of a finished job."""

    images: int
    failed: int
    detections: int


class RowMaker:
    """Makes a row of a prediction.

    Args:
        names, ids: of the categories, by contiguous class.
        threshold: lowest score of detections that are kept.
    """

    def __init__(self, names: Sequence[str], ids: Sequence[int], threshold: float):
        self._names, self._ids, self._threshold = names, ids, threshold

    def __call__(self, prediction: Prediction) -> dict[str, Any]:
        record, error = prediction.record, prediction.error
        if error is None:
            instances = above_threshold(prediction, self._threshold)
            try:
                found = collect(instances, record.image_id)
            except UserError as mistake:  # such as scores that are not finite
                error = str(mistake)
            else:
                entries = table.detections_of(found, self._names, self._ids)
                return table.row(record.image_id, record.name, found.size, entries)
        return table.row(record.image_id, record.name, None, [], error)


class Job:
    """A job in its folder, new or continued.

    Args:
        folder: path or address.
        source: of records in a list.
        names: of the classes.
        settings: `weights` and `config`, digests of both, and `threshold`, a score.
        shard_size: images of a shard; default: that of the job there, else `SHARD_SIZE`.

    Attributes:
        row: function that makes a row of a prediction.

    Raises:
        UserError: the folder holds another job.
    """

    def __init__(
        self,
        folder: str,
        source: Source,
        names: Sequence[str],
        settings: dict[str, Any],
        shard_size: int | None = None,
    ):
        if shard_size is not None and shard_size < 1:
            raise UserError(f"--shard-size is {shard_size}; a shard has at least one image")
        self.folder, self.records, self.names = folder, list(source.records), list(names)
        self.ids = category_ids(names, source.categories)
        self.row = RowMaker(self.names, self.ids, float(settings["threshold"]))
        manifest = {
            "version": 1,
            "images": len(self.records),
            "inputs": inputs_digest(self.records),
            "classes": dict(zip(names, self.ids)),
            **settings,
        }
        self.shard_size = self._take(manifest, shard_size)
        text = json.dumps({**manifest, "shard_size": self.shard_size}, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def _take(self, manifest: dict[str, Any], shard_size: int | None) -> int:
        """Compare with the job that is there, or write that this is one; the shard size."""
        place = place_below(self.folder, MANIFEST)
        if MANIFEST not in list_folder(self.folder):
            shard_size = shard_size or SHARD_SIZE
            text = json.dumps({**manifest, "shard_size": shard_size}, indent=1)
            write_bytes(place, text.encode())
            return shard_size
        try:
            known = json.loads(read_bytes(place))
            size = int(known["shard_size"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{place} is damaged; choose another folder") from error
        ours = {**manifest, "shard_size": shard_size or size}
        for key, what in _COMPARED.items():
            if known.get(key) != ours[key]:
                text = f"{self.folder} is a job with other {what}"
                if key == "inputs" and known.get("images") != ours["images"]:
                    text += f" ({known.get('images')} then, {ours['images']} now)"
                if key in ("threshold", "shard_size"):
                    text += f" ({known.get(key)} then, {ours[key]} now)"
                raise UserError(f"{text}; continue it with the same, or choose another folder")
        return size

    def __len__(self) -> int:
        """How many shards there are."""
        return -(-len(self.records) // self.shard_size)

    def shard(self, index: int) -> list[ImageRecord]:
        """The images of a shard."""
        return self.records[index * self.shard_size : (index + 1) * self.shard_size]

    def place(self, index: int) -> str:
        """Where the part of a shard is."""
        return place_below(self.folder, PARTS, f"part-{index:05d}.parquet")

    def unfinished(
        self, rank: int = 0, world_size: int = 1, retry_failed: bool = False
    ) -> list[int]:
        """Shards of one of several processes that have no whole part.

        Args:
            rank, world_size: number of this process, and of all.
            retry_failed: also those with images that could not be predicted.
        """
        there = set(list_folder(place_below(self.folder, PARTS)))
        found = []
        for index in range(rank, len(self), world_size):
            if os.path.basename(self.place(index)) in there:
                failed = self._failed_in(index)
                if failed == 0 or (failed is not None and not retry_failed):
                    continue
            found.append(index)
        return found

    def _failed_in(self, index: int) -> int | None:
        """How many images of a part could not be predicted; None: it is damaged."""
        try:
            notes = table.read_notes(self.place(index))
        except UserError as error:
            logger.warning("%s; it is computed again", error)
            return None
        if notes.get("job") != self.digest or notes["rows"] != str(len(self.shard(index))):
            logger.warning("%s is of another job; it is computed again", self.place(index))
            return None
        return int(notes["failed"])

    def write(self, index: int, rows: Sequence[dict]) -> None:
        """Write the part of a shard.

        Raises:
            RuntimeError: rows of other images than its own.
        """
        if [r["image_id"] for r in rows] != [r.image_id for r in self.shard(index)]:
            raise RuntimeError(f"shard {index} has rows of other images")
        failed = sum(row["error"] is not None for row in rows)
        notes = {"job": self.digest, "shard": str(index), "failed": str(failed)}
        write_bytes(self.place(index), table.to_parquet(rows, notes))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in order.

        Raises:
            UserError: a part is missing or damaged.
        """
        for index in range(len(self)):
            rows = table.read_rows(self.place(index))
            if [r["image_id"] for r in rows] != [r.image_id for r in self.shard(index)]:
                raise UserError(f"{self.place(index)} has other images; delete it, and start again")
            yield from rows

    def merge(self, polygons: bool = False) -> Merged:
        """Write `coco.json` and `failed.json` of all parts.

        Raises:
            UserError: a part is missing or damaged, or they cannot be written.
        """
        categories = [{"id": i, "name": n} for i, n in zip(self.ids, self.names)]
        failed = []
        with _local_file(place_below(self.folder, MERGED)) as path:
            with CocoFile(path, categories, polygons) as file:
                for row in self.rows():
                    key, name = row["image_id"], row["file_name"]
                    if row["error"] is not None:
                        failed.append({"image_id": key, "file_name": name, "error": row["error"]})
                        continue
                    file.add(key, name, (row["height"], row["width"]), row["detections"])
        assert file.images + len(failed) == len(self.records)
        self._clear()
        text = json.dumps(failed, indent=1, ensure_ascii=False)
        write_bytes(place_below(self.folder, FAILED), text.encode())
        return Merged(file.images, len(failed), file.annotations)

    def _clear(self) -> None:
        """Remove what killed processes have left unfinished."""
        for name in () if is_address(self.folder) else list_folder(place_below(self.folder, PARTS)):
            if name.startswith(".") and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    os.unlink(place_below(self.folder, PARTS, name))


def run_shards(
    job: Job,
    shards: Iterable[int],
    predict: Callable[[list[ImageRecord]], Iterator[Prediction]],
    after: Callable[[int, list[dict]], None] | None = None,
) -> None:
    """Compute shards and write their parts, one after the other.

    Args:
        predict: predictions for the images of a shard, in order.
        after: called with the number and the rows of each shard.
    """
    for index in shards:
        rows = [job.row(prediction) for prediction in predict(job.shard(index))]
        job.write(index, rows)
        if after is not None:
            after(index, rows)


def inputs_digest(records: Iterable[ImageRecord]) -> str:
    """Hash of what is to be predicted, without reading it."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.key()).encode() + b"\n")
    return digest.hexdigest()


@contextlib.contextmanager
def _local_file(place: str) -> Iterator[str]:
    """A path to write a large file to, which is uploaded at the end where the place is remote."""
    if not is_address(place):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, os.path.basename(place))
        yield path
        system, target = file_system(place)
        system.put_file(path, target)
