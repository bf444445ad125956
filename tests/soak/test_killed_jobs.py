"""Jobs of prediction that are killed again and again, at random moments and with other numbers of
processes, end with what one that never was has found."""

import json
import random
import signal
import time

import pytest

from tests.soak.conftest import FULL
from tests.soak.runs import ROOT, Run

pytest.importorskip("pyarrow", reason="pyarrow is not installed (make install brings it)")
IMAGES, KILLS, SHARD_SIZE = (5000, 10, 50) if FULL else (60, 3, 4)
SHARDS = -(-IMAGES // SHARD_SIZE)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def argv(shapes_root, mask_rcnn_weights, tmp_path):
    """Function: arguments of a job on links to a few images, of which two are broken."""
    files = sorted((ROOT / shapes_root / "shapes/train/images").iterdir())
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        (folder / f"{number:05d}.png").symlink_to(files[number % len(files)])
    for number in (7, IMAGES - 2):
        (folder / f"{number:05d}.png").unlink()
        (folder / f"{number:05d}.png").write_bytes(b"no image")

    def make(output):
        return [
            *("--config-file", str(ROOT / "configs/mask_rcnn_tiny.yaml")),
            *("--weights", mask_rcnn_weights, "--input", str(folder), "--output", str(output)),
            *("--confidence-threshold", "0.05", "--shard-size", str(SHARD_SIZE)),
            *("MODEL.RESNETS.NORM=GN", "MODEL.DEVICE=cpu", "INPUT.MIN_SIZE_TEST=64"),
            *("MODEL.RPN.POST_NMS_TOPK_TEST=5", "--workers", "1"),
        ]

    return make


def parts(folder):
    return {p.name: p.read_bytes() for p in (folder / "parts").glob("*.parquet")}


def test_killed_jobs_end_with_the_predictions_of_an_undisturbed_one(argv, tmp_path, counted):
    rng = random.Random(5)
    straight, killed, printed = (tmp_path / x for x in ("straight", "killed", "printed.txt"))
    started = time.monotonic()
    with Run(argv(straight), printed, command="predict-job") as run:
        assert run.wait(3600) == 0, printed.read_text()[-3000:]
    seconds = time.monotonic() - started
    kills, runs, sent, finished = 0, 0, [], []
    while kills < KILLS:
        runs += 1
        end = time.monotonic() + rng.uniform(0.3, 1.2) * seconds / (KILLS + 1)
        while_writing = rng.random() < 0.5
        # However fast it is now, a run gets no further than that all kills fall into the work.
        most = len(parts(killed)) + SHARDS // (KILLS + 2)

        def moment(end=end, while_writing=while_writing, most=most):
            late = time.monotonic() - end
            writes = any((killed / "parts").glob(".*.tmp"))
            if sum(1 for _ in (killed / "parts").glob("*.parquet")) >= most:
                return True
            return late > 0 and (writes or not while_writing or late > 2)

        with Run(argv(killed), printed, 2 if runs % 3 == 0 else 1, command="predict-job") as run:
            run.wait_until(moment, 3600)
            if run.code is not None:
                assert run.code == 0, printed.read_text()[-3000:]
                break
            number = rng.choice(SIGNALS)
            run.signal(number, group=True)
            assert run.wait(60) not in (None, 0), f"{number} did not end the job"
        kills += 1
        sent.append(number.name)
        finished.append(len(parts(killed)))
    with Run(argv(killed), printed, command="predict-job") as run:
        assert run.wait(3600) == 0, printed.read_text()[-3000:]
    assert kills == KILLS, f"the job ended after {kills} kills"
    assert parts(killed) == parts(straight) and len(parts(killed)) == SHARDS
    for name in ("coco.json", "failed.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    data = json.loads((killed / "coco.json").read_text())
    assert len(data["images"]) == IMAGES - 2
    assert len({i["id"] for i in data["images"]}) == IMAGES - 2
    assert len(json.loads((killed / "failed.json").read_text())) == 2
    assert data["annotations"] and finished == sorted(finished)
    assert not list(killed.rglob(".*.tmp"))
    counted(
        {
            "images": IMAGES,
            "kills": kills,
            **{name: sent.count(name) for name in sorted(set(sent))},
            "shards": len(parts(killed)),
            "shards there after each kill": finished,
            "detections": len(data["annotations"]),
        }
    )
