"""Train and test loaders: one global stream, independent of processes and workers, resumable."""

import copy
import itertools

import pytest
import torch

from d2ext.data import (
    GlobalBatchSampler,
    InstanceSegMapper,
    build_test_loader,
    build_train_loader,
    get_dataset_records,
)
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.utils import comm

SIZES = [(160, 120), (120, 160), (128, 128)]


def _record(index, crowd=False, annotations=1):
    width, height = SIZES[index % 3]
    objects = [{"iscrowd": int(crowd), "category_id": 0}] * annotations
    return {"image_id": index, "width": width, "height": height, "annotations": objects}


def _keep(record):
    return record


def _take(loader, count):
    return [[(r["image_id"], r["sample_seed"]) for r in b] for b in itertools.islice(loader, count)]


def _loader(num_images=10, batch=4, **kwargs):
    records = [_record(i) for i in range(num_images)]
    return build_train_loader(records, mapper=_keep, total_batch_size=batch, **kwargs)


def test_every_epoch_shows_every_image_once_in_another_order():
    stream = list(itertools.chain(*_take(_loader(aspect_ratio_grouping=False), 10)))
    epochs = [[i for i, _ in stream[k : k + 10]] for k in (0, 10, 20, 30)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4


def test_sample_seeds_are_unique_and_depend_on_the_seed():
    stream = list(itertools.chain(*_take(_loader(), 50)))
    seeds = {s for _, s in stream}
    assert len(seeds) == len(stream) and all(0 <= s < 2**63 for s in seeds)
    assert max(seeds) > 2**60
    other = {s for b in _take(_loader(seed=1), 50) for _, s in b}
    assert not seeds & other


def test_same_seed_gives_the_same_stream_whatever_the_global_generators_do():
    first = _take(_loader(seed=3), 12)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert _take(_loader(seed=3), 12) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert _take(_loader(seed=4), 12) != first


def test_batches_hold_one_aspect_group_and_lose_no_image():
    batches = _take(_loader(num_images=9, batch=4), 45)
    landscape = {i for i in range(9) if i % 3 == 0}
    assert all(len({i in landscape for i, _ in b}) == 1 for b in batches)
    counts = [sum(i == k for b in batches for i, _ in b) for k in range(9)]
    assert max(counts) - min(counts) <= 2  # only incomplete batches are still waiting


@pytest.mark.parametrize("grouping", [True, False])
def test_processes_share_the_batches_of_a_single_process(monkeypatch, grouping):
    whole = _take(_loader(aspect_ratio_grouping=grouping), 12)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(_take(_loader(aspect_ratio_grouping=grouping), 12))
    for batch, first, second in zip(whole, *shares):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(batch)


@pytest.mark.parametrize("start", [1, 5, 23])
def test_start_iter_continues_the_stream(start):
    assert _take(_loader(start_iter=start), 6) == _take(_loader(), start + 6)[start:]


def test_start_iter_loads_no_skipped_image():
    loaded = []

    def mapper(record):
        loaded.append(record["image_id"])
        return record

    records = [_record(i) for i in range(6)]
    loader = build_train_loader(records, mapper=mapper, total_batch_size=2, start_iter=1000)
    next(iter(loader))
    assert len(loaded) == 2


def test_second_pass_over_a_loader_starts_again():
    loader = _loader()
    assert _take(loader, 5) == _take(loader, 5)


def test_worker_count_does_not_change_the_images(shapes_few):
    mapper = InstanceSegMapper(
        True,
        augmentations=[T.RandomFlip(), T.RandomContrast(0.5, 1.5)],
        semantic="dataset",
    )
    batches = []
    for num_workers in (0, 2):
        loader = build_train_loader(
            shapes_few, mapper=mapper, total_batch_size=2, num_workers=num_workers, seed=5
        )
        batches.append(list(itertools.islice(loader, 3)))
    for a, b in zip(itertools.chain(*batches[0]), itertools.chain(*batches[1])):
        assert a["sample_seed"] == b["sample_seed"] and a["image_id"] == b["image_id"]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["sem_seg"], b["sem_seg"])
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)


def test_images_without_usable_annotations_are_left_out_on_request(shapes_few):
    assert len(get_dataset_records(shapes_few)) == 27
    assert len(get_dataset_records([shapes_few], filter_empty=True)) == 26
    records = [_record(0), _record(1, crowd=True), _record(2, annotations=0)]
    loader = build_train_loader(records, mapper=_keep, total_batch_size=1)
    assert {i for b in _take(loader, 5) for i, _ in b} == {0}
    loader = build_train_loader(records, mapper=_keep, total_batch_size=1, filter_empty=False)
    assert {i for b in _take(loader, 9) for i, _ in b} == {0, 1, 2}


def test_random_seed_is_agreed_upon_by_all_processes(monkeypatch):
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 17)
    assert _take(_loader(seed=-1), 5) == _take(_loader(seed=17), 5)


def test_test_loader_shows_every_image_once_in_order(shapes_few):
    mapper = InstanceSegMapper(False, augmentations=[])
    batches = list(build_test_loader(shapes_few, mapper=mapper))
    assert [[r["image_id"] for r in b] for b in batches] == [[i] for i in range(1, 28)]


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"dataset": "shapes_fe"}, "unknown data set 'shapes_fe'; did you mean shapes_few"),
        ({"dataset": "@"}, "unknown data set '@'; register it first"),
        ({"dataset": "nothing"}, "Dataset 'nothing' is empty!"),
        ({"dataset": "crowded"}, "crowded: no image has a usable annotation"),
        ({"dataset": []}, "is empty"),
        ({"dataset": [{"file_name": "a.png"}]}, "a.png has no width and height"),
        ({"dataset": "shapes_few", "total_batch_size": 3}, "batch size 3 .* processes, 2"),
        ({"dataset": "shapes_few", "total_batch_size": 0}, "batch size 0 .* positive"),
    ],
)
def test_mistakes_are_reported_in_one_line(monkeypatch, shapes_few, arguments, match):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    DatasetCatalog.register("nothing", list)
    DatasetCatalog.register("crowded", lambda: [_record(0, crowd=True)])
    with pytest.raises(UserError, match=match) as info:
        build_train_loader(**{"mapper": _keep, "total_batch_size": 2, **arguments})
    assert "\n" not in str(info.value)


def _broken_copy(name, folder, broken):
    """Records of a data set with the files of some images cut off."""
    records = copy.deepcopy(get_dataset_records(name, filter_empty=True))
    for index in broken:
        path = folder / f"broken{index}.png"
        with open(records[index]["file_name"], "rb") as f:
            path.write_bytes(f.read()[:-100])
        records[index]["file_name"] = str(path)
    return records


def _ids(loader, count):
    return [[r["image_id"] for r in batch] for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_named_once_and_replaced(shapes_few, tmp_path, num_workers, caplog):
    records = _broken_copy(shapes_few, tmp_path, [3, 5])
    mapper = InstanceSegMapper(True, augmentations=[], semantic="none")
    options = {"total_batch_size": 2, "seed": 1, "aspect_ratio_grouping": False}
    batches = list(
        itertools.islice(
            build_train_loader(records, mapper=mapper, num_workers=num_workers, **options), 27
        )
    )
    sound = build_train_loader(records, mapper=lambda r: r, **options)
    lost = {records[3]["image_id"], records[5]["image_id"]}
    for batch, wanted in zip(batches, _ids(sound, 27)):
        assert len(batch) == 2 and all("unreadable_images" not in item for item in batch)
        for item, image_id in zip(batch, wanted):
            assert item["image_id"] not in lost
            assert item["image_id"] == image_id or image_id in lost
    again = build_train_loader(records, mapper=mapper, **options)
    assert _ids(again, 27) == [[r["image_id"] for r in batch] for batch in batches]
    lines = [r.getMessage() for r in caplog.records if r.name == "d2ext.data.loader"]
    first = lines[: len(lines) // 2]
    assert len(first) == 2 and {"broken3.png" in x for x in first} == {True, False}
    assert "cannot read image" in first[0] and "(2 of at most 10)" in first[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_unreadable_images_end_in_one_line(shapes_few, tmp_path, num_workers):
    records = _broken_copy(shapes_few, tmp_path, [0, 1, 2, 3])
    mapper = InstanceSegMapper(True, augmentations=[], semantic="none")
    loader = build_train_loader(
        records, mapper=mapper, total_batch_size=2, num_workers=num_workers, max_unreadable=2
    )
    with pytest.raises(UserError, match="3 images cannot be read, at most 2 are replaced") as info:
        _ids(loader, 40)
    assert "\n" not in str(info.value)
    loader = build_train_loader(records[:4], mapper=mapper, total_batch_size=2)
    with pytest.raises(UserError, match="cannot read image .*; nor can 9 others be"):
        _ids(loader, 1)


def test_a_replacement_is_of_the_same_group(shapes_few, tmp_path):
    from d2ext.data.loader import MappedRecords, UnreadableImageError

    def mapper(record):
        if record["image_id"] in (0, 3):
            raise UnreadableImageError(f"{record['image_id']} is lost")
        return record

    records = [_record(i) for i in range(12)]
    data = MappedRecords(records, mapper, [i % 3 for i in range(12)])
    for seed in range(20):
        out = data[0, seed]
        assert out["image_id"] in (6, 9) and out["unreadable_images"][0] == "0 is lost"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_mistakes_stay_one_line_with_loading_processes(shapes_few, tmp_path, training, num_workers):
    records = copy.deepcopy(get_dataset_records(shapes_few, filter_empty=True))[:2]
    for record in records:
        record["width"] += 1
    mapper = InstanceSegMapper(training, augmentations=[], semantic="none")
    if training:
        loader = build_train_loader(
            records, mapper=mapper, total_batch_size=1, num_workers=num_workers
        )
    else:
        loader = build_test_loader(records, mapper=mapper, num_workers=num_workers)
    with pytest.raises(UserError) as info:
        next(iter(loader))
    text = str(info.value)
    assert "\n" not in text and text.count("annotation") and "Traceback" not in text


def test_sampler_of_no_images_is_rejected():
    with pytest.raises(UserError, match="empty"):
        GlobalBatchSampler([], 2, 0)


_SPAWNED = """
import multiprocessing, sys
from d2ext.data import InstanceSegMapper, build_test_loader, register_shapes
from detectron2.data import transforms as T

multiprocessing.set_start_method("spawn")
register_shapes("few", "train", sys.argv[1], 27)
mapper = InstanceSegMapper(is_train=False, augmentations=[T.ResizeShortestEdge(64)])
loader = build_test_loader("few", mapper=mapper, num_workers=1)
print(sum(len(batch) for batch in loader), "images")
"""


def test_loading_processes_that_share_nothing_adapt_detectron2(run_python, shapes_root):
    """As on macOS; without a script that they could import, as in a notebook."""
    process = run_python("-W", "ignore", "-c", _SPAWNED, shapes_root)
    assert process.stdout.endswith("27 images\n"), process.stderr


_ENDED = """
import os, signal, sys, torch
from d2ext.data import build_train_loader

def keep(record):
    return record

def child():
    records = [{"image_id": i, "width": 4, "height": 3, "annotations": []} for i in range(8)]
    loader = build_train_loader(
        records, mapper=keep, total_batch_size=2, num_workers=2, filter_empty=False
    )
    batches = iter(loader)
    next(batches)
    try:
        raise KeyboardInterrupt  # a traceback that lives as long as the process
    except KeyboardInterrupt:
        sys.last_traceback = sys.exc_info()[2]
    loader.close()

if __name__ == "__main__":
    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    print("ended" if process.exitcode == 0 else "hangs")
    process.kill()
"""


def test_closing_ends_the_loading_processes(run_python, tmp_path):
    """Else a process that multiprocessing has started waits for them forever."""
    (tmp_path / "ended.py").write_text(_ENDED)
    assert run_python("-W", "ignore", tmp_path / "ended.py").stdout.endswith("ended\n")
