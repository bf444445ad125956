"""Checkpoints on the way: which are kept, and what a full disk does."""

import resource

import pytest
import torch

from d2ext.engine import train
from d2ext.engine.hooks import PatientWriter
from d2ext.errors import UserError

from tests.engine.helpers import calling, losses


def test_only_the_newest_checkpoints_are_kept(short_run, tmp_path):
    train(short_run("mask_rcnn", "yaml", "run", "SOLVER.CHECKPOINT_KEEP=2"))
    names = sorted(p.name for p in (tmp_path / "run").glob("*.pth"))
    assert names == ["model_0000003.pth", "model_0000005.pth", "model_final.pth"]


@pytest.fixture
def full_disk():
    """Function: from now on no file of this process may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_out_checkpoints_and_the_run_goes_on(
    short_run, tmp_path, full_disk, caplog
):
    experiment = short_run("mask_rcnn", "yaml", "run")  # saves after iterations 1, 3 and 5
    folder, seen = tmp_path / "run", []

    def look():
        seen.append(sorted(p.name for p in folder.glob("model*")))
        seen.append((folder / "last_checkpoint").read_text())
        full_disk(-1)

    train(calling(experiment, {2: lambda: full_disk(100_000), 4: look}))
    assert seen == [["model_0000001.pth"], "model_0000001.pth"]  # nothing half-written
    [warning] = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert f"'{folder / 'model_0000003.pth'}'" in warning and "MiB are free" in warning
    assert "tried in 2 iterations" in warning
    assert (folder / "model_0000005.pth").exists() and (folder / "model_final.pth").exists()
    assert set(losses(folder)) == set(range(6))


def test_a_final_checkpoint_that_cannot_be_written_is_an_error_and_resuming_completes_the_run(
    short_run, tmp_path, full_disk
):
    experiment = short_run("mask_rcnn", "yaml", "run", "train.checkpointer.period=5")
    with pytest.raises(UserError, match="cannot write '.*model_final.pth': .* MiB are free"):
        train(calling(experiment, {5: lambda: full_disk(100_000)}))
    full_disk(-1)
    train(short_run("mask_rcnn", "yaml", "run"), resume=True)
    train(short_run("mask_rcnn", "yaml", "straight"))
    finals = [torch.load(tmp_path / run / "model_final.pth") for run in ("run", "straight")]
    assert all(torch.equal(w, finals[1]["model"][k]) for k, w in finals[0]["model"].items())


def test_metrics_that_cannot_be_written_do_not_end_a_training(caplog):
    class Full:
        def write(self):
            raise OSError(28, "No space left on device")

        close = write

    writer = PatientWriter(Full())
    writer.write()
    writer.write()
    writer.close()
    [warning] = [record.getMessage() for record in caplog.records]
    assert "Full cannot write" in warning and "No space left" in warning
