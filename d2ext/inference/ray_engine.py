"""A job on a cluster by Ray Data: tasks that read and prepare images, and actors that hold a model,
as stages between which Ray moves the images and holds back those that are ahead.

The rows come back to the process that has started it, which writes the parts of shards, as without
Ray: the folder is the same. Ray starts tasks and actors of a lost machine again.
"""

import dataclasses
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from d2ext.errors import UserError
from d2ext.inference.batching import Preparation, decode_images, predict_in_batches
from d2ext.inference.job import Job, RowMaker
from d2ext.inference.records import ImageRecord
from d2ext.inference.storage import is_address

# Images that are handed from stage to stage at once: tens of megabytes.
_BLOCK = 16


def require_ray() -> ModuleType:
    """ray with ray.data, or a `UserError` that says how to get it."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            "--engine ray needs the package ray: pip install 'ray[data]', or pip install '.[ray]' "
            "in the repository, on all machines"
        ) from error
    return ray


def connect(address: str | None) -> ModuleType:
    """ray, connected to a cluster; None: one on this machine, which ends with this process.

    Raises:
        UserError: ray is not installed, there is no cluster, or none starts.
    """
    ray = require_ray()
    if ray.is_initialized():
        return ray
    try:
        ray.init(address=address or "local", log_to_driver=False, include_dashboard=False)
    except Exception as error:  # Ray raises this very class where a cluster does not start in time
        reason = " ".join(str(error).split())[:160]
        if address is None:
            raise UserError(
                f"no Ray cluster starts on this machine ({reason}); try again when it is less "
                "busy, or start one with ray start and give --address auto"
            ) from error
        raise UserError(
            f"--address {address}: no Ray cluster answers ({reason}); start one with ray start"
        ) from error
    return ray


class _Reading:
    """The stage of tasks that read: a block of records to prepared images, pickled."""

    def __init__(self, prepare: Preparation):
        self._prepare = prepare

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        records = [pickle.loads(content) for content in block["record"]]
        read = [pickle.dumps(item, 5) for item in decode_images(records, self._prepare, 0)]
        return {"position": block["position"], "decoded": read}


class _Predicting:
    """The stage of actors, each with a model: prepared images to rows, as JSON."""

    def __init__(self, make_model: Callable[[], Any], row: RowMaker, batch_size: int):
        self._model, self._row, self._batch_size = make_model(), row, batch_size

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        decoded = (pickle.loads(content) for content in block["decoded"])
        found = predict_in_batches(self._model, decoded, self._batch_size)
        return {"position": block["position"], "row": [json.dumps(self._row(p)) for p in found]}


def run_on_ray(
    job: Job,
    shards: Sequence[int],
    prepare: Preparation,
    make_model: Callable[[], Any],
    address: str | None = None,
    actors: int = 1,
    gpus: float = 0.0,
    batch_size: int = 1,
    after: Callable[[int, list[dict]], None] | None = None,
) -> None:
    """Compute shards of a job on a cluster and write their parts here.

    Args:
        prepare: of the predictor.
        make_model: called by each actor; the model in evaluation mode, on its device.
        address: see `connect`.
        actors: how many models there are at once.
        gpus: of each of them.
        after: called with the number and the rows of each shard.

    Raises:
        UserError: see `connect`; Ray has given up, what is finished stays.
    """
    if not shards:
        return
    ray = connect(address)
    items = [
        {"position": index * job.shard_size + place, "record": pickle.dumps(_absolute(record))}
        for index in shards
        for place, record in enumerate(job.shard(index))
    ]
    data = ray.data.from_items(items, override_num_blocks=-(-len(items) // _BLOCK))
    # One block is one task, so that images follow each other and Ray counts what is under way.
    data = data.map_batches(_Reading(prepare), batch_size=_BLOCK, num_cpus=1)
    data = data.map_batches(
        _Predicting,
        fn_constructor_args=(make_model, job.row, batch_size),
        batch_size=max(_BLOCK, 4 * batch_size),
        concurrency=actors,
        num_gpus=gpus,
        num_cpus=1,
    )
    try:
        _write(job, _rows(data), after)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(
            f"the Ray cluster has given up: {reason}; start the job again to continue"
        ) from error


def _rows(data: Any) -> Iterator[tuple[int, dict]]:
    for block in data.iter_batches(batch_size=None):
        for position, text in zip(block["position"].tolist(), block["row"].tolist()):
            yield position, json.loads(text)


def _write(job: Job, rows: Iterator[tuple[int, dict]], after) -> None:
    """Write each shard when all of its rows are there, in whatever order they come."""
    waiting: dict[int, dict[int, dict]] = {}
    for position, row in rows:
        index = position // job.shard_size
        known = waiting.setdefault(index, {})
        known[position] = row
        if len(known) == len(job.shard(index)):
            found = [known[key] for key in sorted(known)]
            job.write(index, found)
            del waiting[index]
            if after is not None:
                after(index, found)
    if waiting:
        raise UserError(f"{len(waiting)} shards did not come back whole; start the job again")


def _absolute(record: ImageRecord) -> ImageRecord:
    """A record that can be read in another working folder."""
    if not record.place or is_address(record.place):
        return record
    return dataclasses.replace(record, place=os.path.abspath(record.place))
