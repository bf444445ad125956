"""Jobs: parts of shards, what continues them, and one file of all."""

import json
import os

import numpy as np
import pytest
import torch

from d2ext.errors import UserError
from d2ext.inference import ImageRecord, Prediction, Source
from d2ext.inference.job import Job, run_shards

from detectron2.structures import Boxes, Instances

pytest.importorskip("pyarrow", reason="pyarrow is not installed (make install brings it)")
NAMES = ["disk", "ring"]
SETTINGS = {"weights": "w", "config": "c", "threshold": 0.5}


def records(count=10):
    return [ImageRecord(i, f"{i}.png", f"images/{i}.png") for i in range(1, count + 1)]


def predict(shard):
    """As many detections as the last digit of the id says; number 4 is broken, the scores of number
    7 are not finite."""
    for record in shard:
        if record.image_id == 4:
            yield Prediction(record, error="image '4.png' cannot be read")
            continue
        count = record.image_id % 10
        instances = Instances((20, 30), pred_boxes=Boxes(torch.ones(count, 4) * 3))
        instances.scores = torch.linspace(1.0, 0.6, count) / (record.image_id != 7)
        instances.pred_classes = torch.arange(count) % 2
        instances.pred_masks = torch.zeros(count, 20, 30, dtype=torch.bool)
        instances.pred_masks[:, :5, : record.image_id] = True
        yield Prediction(record, {"instances": instances})


@pytest.fixture(params=["here", "remote"])
def folder(request, tmp_path):
    if request.param == "here":
        return str(tmp_path / "job")
    pytest.importorskip("fsspec")
    return f"memory://{tmp_path.name}/job"


def make(folder, count=10, shard_size=4, names=NAMES, **changes):
    return Job(folder, Source(records(count), count), names, {**SETTINGS, **changes}, shard_size)


def load(job, name):
    from d2ext.inference.storage import place_below, read_bytes

    return json.loads(read_bytes(place_below(job.folder, name)))


def test_a_job_ends_in_one_file_with_exact_counts(folder):
    job = make(folder)
    assert [len(job.shard(i)) for i in range(len(job))] == [4, 4, 2]
    run_shards(job, job.unfinished(), predict)
    merged = job.merge()
    assert merged == (8, 2, 1 + 2 + 3 + 5 + 6 + 8 + 9 + 0)
    data = load(job, "coco.json")
    assert [i["id"] for i in data["images"]] == [1, 2, 3, 5, 6, 8, 9, 10]
    assert len(data["annotations"]) == merged.detections
    assert [a["id"] for a in data["annotations"]] == list(range(1, merged.detections + 1))
    assert {a["area"] for a in data["annotations"] if a["image_id"] == 6} == {5 * 6}
    failed = load(job, "failed.json")
    assert [(x["image_id"], x["file_name"]) for x in failed] == [(4, "4.png"), (7, "7.png")]
    assert "cannot be read" in failed[0]["error"] and "not finite" in failed[1]["error"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_share_the_shards_without_overlap(tmp_path, size):
    job = make(str(tmp_path), 23, 3)
    shares = [job.unfinished(rank, size) for rank in range(size)]
    assert sorted(sum(shares, [])) == list(range(8))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_finished_is_not_computed_again(folder):
    run_shards(make(folder), [1], predict)
    before = make(folder)
    assert before.unfinished() == [0, 2] and before.unfinished(1, 2) == []
    again = make(folder, shard_size=None)  # as it was begun
    assert again.shard_size == 4 and again.unfinished() == [0, 2]
    seen = []
    run_shards(again, again.unfinished(), predict, lambda index, rows: seen.append(len(rows)))
    assert seen == [4, 2] and again.unfinished() == []


def test_shards_with_failures_can_be_tried_again(tmp_path):
    job = make(str(tmp_path))
    run_shards(job, job.unfinished(), predict)
    assert job.unfinished() == [] and job.unfinished(retry_failed=True) == [0, 1]


def test_an_interruption_leaves_whole_parts_only(tmp_path):
    def interrupted(shard):
        for prediction in predict(shard):
            if prediction.record.image_id == 6:
                raise KeyboardInterrupt
            yield prediction

    job = make(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_shards(job, job.unfinished(), interrupted)
    assert os.listdir(tmp_path / "parts") == ["part-00000.parquet"]
    with pytest.raises(UserError, match="part-00001.parquet cannot be read|No such file"):
        job.merge()
    assert not (tmp_path / "coco.json").exists()


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_part_is_named_and_computed_again(tmp_path, caplog, damage):
    job = make(str(tmp_path))
    run_shards(job, job.unfinished(), predict)
    part = tmp_path / "parts/part-00001.parquet"
    good = part.read_bytes()
    other = (tmp_path / "parts/part-00000.parquet").read_bytes()
    part.write_bytes({"cut": good[:-40], "foreign": other, "empty": b""}[damage])
    if damage == "foreign":
        with pytest.raises(UserError, match="part-00001.parquet has other images"):
            job.merge()
        return
    assert job.unfinished() == [1] and "part-00001.parquet" in caplog.text
    run_shards(job, [1], predict)
    assert part.read_bytes() == good


def test_parts_are_the_same_whoever_computes_them(tmp_path):
    one, two = make(str(tmp_path / "one")), make(str(tmp_path / "two"))
    run_shards(one, one.unfinished(), predict)
    for rank in (2, 0, 1):
        run_shards(two, two.unfinished(rank, 3), predict)
    for index in range(len(one)):
        with open(one.place(index), "rb") as a, open(two.place(index), "rb") as b:
            assert a.read() == b.read()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "x"}, "other weights"),
        ({"config": "x"}, "other config or overrides"),
        ({"threshold": 0.3}, r"other confidence threshold \(0.5 then, 0.3 now\)"),
        ({"names": ["disk", "cube"]}, "other names of classes"),
        ({"count": 11}, r"other images \(10 then, 11 now\)"),
        ({"shard_size": 5}, r"other shard size \(4 then, 5 now\)"),
    ],
)
def test_another_job_in_the_folder_is_refused(tmp_path, changes, words):
    make(str(tmp_path))
    with pytest.raises(UserError, match=f"is a job with {words}; continue it with the same"):
        make(str(tmp_path), **changes)


def test_other_files_of_the_same_number_are_another_job(tmp_path):
    make(str(tmp_path))
    others = [*records(9), ImageRecord(10, "x.png", "images/x.png")]
    with pytest.raises(UserError, match="is a job with other images;"):
        Job(str(tmp_path), Source(others, 10), NAMES, SETTINGS)


def test_a_damaged_description_and_a_wrong_shard_size_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--shard-size is 0"):
        make(str(tmp_path), shard_size=0)
    for text in ("{", "[]", "{}", '{"shard_size": "x"}'):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(UserError, match="job.json is damaged"):
            make(str(tmp_path))


def test_rows_of_other_images_are_not_written(tmp_path):
    job = make(str(tmp_path))
    rows = [job.row(p) for p in predict(job.shard(0))]
    with pytest.raises(RuntimeError, match="shard 1 has rows of other images"):
        job.write(1, rows)
    with pytest.raises(RuntimeError):
        job.write(0, rows[:-1])
    assert not (tmp_path / "parts").exists()


def test_detections_below_the_threshold_are_left_out(tmp_path):
    job = make(str(tmp_path), threshold=0.9)
    (row,) = [r for p in predict(job.shard(0)) if (r := job.row(p))["image_id"] == 3]
    np.testing.assert_allclose([d["score"] for d in row["detections"]], [1.0])
