"""A job on a Ray cluster of two workers has the rows of a job without it, also if one is lost."""

import functools
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch

from d2ext.errors import UserError
from d2ext.inference import ImageRecord, Preparation, Source, decode_images, predict_in_batches
from d2ext.inference.job import Job, run_shards

from detectron2.structures import Boxes, Instances

pytest.importorskip("pyarrow", reason="pyarrow is not installed (make install brings it)")
PREPARE = Preparation([], "BGR")


class Model:
    """One detection whose score is the brightness of the image. Kills its own process once, at the
    image of value 50, if a file is named that is not there yet."""

    def __init__(self, flag=None):
        self.backbone, self._flag = types.SimpleNamespace(size_divisibility=32), flag

    def __call__(self, inputs):
        found = []
        for x in inputs:
            value = float(x["image"].mean())
            if self._flag and round(value) == 50 and not os.path.exists(self._flag):
                open(self._flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            size = x["height"], x["width"]
            instances = Instances(size, pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]])))
            instances.scores = torch.tensor([0.5 + value / 1000])
            instances.pred_classes = torch.tensor([0])
            found.append({"instances": instances})
        return found


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[data]')")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not installed
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield ray
    ray.shutdown()


def make(folder, count=100):
    """A job on images that are given; number 31 is broken."""
    pixels = [np.full((40, 50 + i % 2, 3), i, np.uint8) for i in range(count)]
    records = [ImageRecord(i, f"{i}.png", pixels=x) for i, x in enumerate(pixels)]
    records[31] = ImageRecord(31, "31.png", pixels=b"broken")
    settings = {"weights": "w", "config": "c", "threshold": 0.5}
    return Job(str(folder), Source(records, count), ["disk"], settings, 16)


@pytest.mark.slow
def test_a_cluster_whose_actor_is_killed_gives_what_one_process_gives(ray, tmp_path):
    from d2ext.inference.ray_engine import run_on_ray

    alone, job, flag = make(tmp_path / "alone"), make(tmp_path / "job"), str(tmp_path / "killed")
    model = Model()
    run_shards(
        alone,
        alone.unfinished(),
        lambda shard: predict_in_batches(model, decode_images(shard, PREPARE, 0), 4),
    )
    shards = []
    run_shards(
        job, [2], lambda shard: predict_in_batches(model, decode_images(shard, PREPARE, 0), 4)
    )
    factory = functools.partial(Model, flag)
    run_on_ray(
        job,
        job.unfinished(),
        PREPARE,
        factory,
        actors=1,
        batch_size=4,
        after=lambda index, rows: shards.append(index),
    )
    assert os.path.exists(flag)  # one was
    assert sorted(shards) == [0, 1, 3, 4, 5, 6]
    assert list(job.rows()) == list(alone.rows())
    assert job.merge() == (99, 1, 99)


def test_no_cluster_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[data]')")
    from d2ext.inference.ray_engine import connect

    def refuse(**options):
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match="--address far:1: no Ray cluster answers .nobody there."):
        connect("far:1")


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[data]')")
    from d2ext.inference.ray_engine import connect

    def time_out(**options):
        assert options["address"] == "local"
        raise Exception("The current node\ntimed out")  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(UserError, match="no Ray cluster starts .* .The current node timed out.; "):
        connect(None)


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    from d2ext.inference.ray_engine import require_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'ray.data.'"):
        require_ray()
