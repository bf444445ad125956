"""A long job on a Ray cluster of two machines, of which one is lost: nothing is lost or doubled,
and the memory does not grow with the number of images. Only by `make soak`; `make test` has the
short form in tests/inference/test_ray_engine.py."""

import resource
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from d2ext.inference import ImageRecord, Preparation, Source, decode_images, predict_in_batches
from d2ext.inference.job import Job, run_shards

from detectron2.structures import Boxes, Instances

from tests.soak.conftest import FULL

pytestmark = pytest.mark.skipif(not FULL, reason="takes minutes; make soak")
IMAGES, STORE = 20_000, 10**8
PREPARE = Preparation([], "BGR")


class Model:
    """One detection whose score is the brightness of the image."""

    backbone = types.SimpleNamespace(size_divisibility=32)

    def __call__(self, inputs):
        found = []
        for x in inputs:
            size = x["height"], x["width"]
            instances = Instances(size, pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]])))
            instances.scores = torch.tensor([0.5 + float(x["image"].mean()) / 1000])
            instances.pred_classes = torch.tensor([0])
            found.append({"instances": instances})
        return found


@pytest.fixture
def cluster():
    """A Ray cluster of two machines with one processor each; this process is in it without any."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[data]')")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not installed
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
    )
    machines = [cluster.add_node(num_cpus=2, object_store_memory=STORE) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield types.SimpleNamespace(lose=lambda: cluster.remove_node(machines[0], False))
    ray.shutdown()
    cluster.shutdown()


def test_a_cluster_that_loses_a_machine_finds_what_one_process_finds(
    cluster, shapes_root, tmp_path, counted
):
    from d2ext.inference.ray_engine import run_on_ray

    pytest.importorskip("pyarrow")
    files = sorted((Path(shapes_root) / "shapes/train/images").iterdir())
    (tmp_path / "images").mkdir()
    records = []
    for number in range(IMAGES):
        path = tmp_path / "images" / f"{number}.png"
        path.symlink_to(files[number % len(files)])
        records.append(ImageRecord(number, path.name, str(path)))
    settings = {"weights": "w", "config": "c", "threshold": 0.5}
    jobs = [Job(str(tmp_path / x), Source(records, 0), ["disk"], settings) for x in "ab"]
    model = Model()
    run_shards(
        jobs[0],
        jobs[0].unfinished(),
        lambda shard: predict_in_batches(model, decode_images(shard, PREPARE, 0), 4),
    )
    done, started, memory = [], time.monotonic(), []

    def after(index, rows):
        done.append(index)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        if len(done) == len(jobs[1]) // 2:
            cluster.lose()

    run_on_ray(jobs[1], jobs[1].unfinished(), PREPARE, Model, actors=2, batch_size=4, after=after)
    seconds = time.monotonic() - started
    assert sorted(done) == list(range(len(jobs[1])))
    assert all(a == b for a, b in zip(jobs[0].rows(), jobs[1].rows(), strict=True))
    assert jobs[1].merge() == (IMAGES, 0, IMAGES)
    counted(
        {
            "images": IMAGES,
            "machines lost": 1,
            "images per second": round(IMAGES / seconds),
            "MiB of the object store of a machine": STORE // 2**20,
            "MiB of the first process after the first shard": memory[0],
            "MiB after the last": memory[-1],
        }
    )
