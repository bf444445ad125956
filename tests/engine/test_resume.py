"""A run that is interrupted and resumed is the run that was never interrupted."""

import itertools

import pytest
import torch

from d2ext.engine import train
from d2ext.engine.resuming import find_last_checkpoint
from d2ext.errors import UserError

from tests.engine.helpers import losses


class PowerFailure(Exception):
    """Stands for a crash at any point of an iteration."""


def failing_after(experiment, batches):
    """Let the data loader of an experiment break down after so many batches."""
    build = experiment.build_train_loader

    def build_failing(start_iter=0):
        yield from itertools.islice(build(start_iter), batches)
        raise PowerFailure

    experiment.build_train_loader = build_failing
    return experiment


@pytest.mark.parametrize("kind", ["yaml", "py"])
@pytest.mark.parametrize("name", ["mask_rcnn", "htc"])
def test_resumed_losses_and_weights_equal_those_of_an_uninterrupted_run(
    short_run, tmp_path, name, kind
):
    train(short_run(name, kind, "straight"))
    with pytest.raises(PowerFailure):
        train(failing_after(short_run(name, kind, "broken"), batches=5))
    torch.manual_seed(12345)  # a new process starts from another state
    train(short_run(name, kind, "broken"), resume=True)

    before, after = losses(tmp_path / "straight"), losses(tmp_path / "broken")
    assert set(before) == set(after) == set(range(6))
    for iteration in range(6):
        assert after[iteration] == pytest.approx(before[iteration], abs=1e-6)
    weights = [
        torch.load(tmp_path / folder / "model_final.pth", weights_only=True)["model"]
        for folder in ("straight", "broken")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_without_its_final_checkpoint_is_completed(short_run, tmp_path):
    train(short_run("mask_rcnn", "yaml", "run"))
    final = tmp_path / "run/model_final.pth"
    whole = torch.load(final, weights_only=True)
    for damage in ("missing", "cut"):
        final.unlink() if damage == "missing" else final.write_bytes(final.read_bytes()[:-999])
        (tmp_path / "run/last_checkpoint").write_text("model_0000005.pth")
        train(short_run("mask_rcnn", "yaml", "run"), resume=True)
        again = torch.load(final, weights_only=True)
        assert same_tensors(again["model"], whole["model"])
        assert again["iteration"] == whole["iteration"] == 5
        assert again["trainer"]["iteration"] == 5
        state, before = (c["rng"]["processes"][0] for c in (again, whole))
        assert torch.equal(state["torch"], before["torch"])
        assert (tmp_path / "run/last_checkpoint").read_text() == "model_final.pth"
    written = final.stat().st_mtime_ns
    train(short_run("mask_rcnn", "yaml", "run"), resume=True)
    assert final.stat().st_mtime_ns == written  # nothing to complete


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[-1000:]
    elif how == "one bit":  # in the middle of the weights
        data[len(data) // 2] ^= 16
    elif how == "zeros":
        data[:] = bytes(len(data))
    path.write_bytes(data)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "one bit", "zeros", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_newest_good_one_is_found(
    short_run, tmp_path, caplog, how
):
    folder = tmp_path / "run"
    train(short_run("mask_rcnn", "yaml", "run", "train.max_iter=4"))
    assert find_last_checkpoint(str(folder)) == (str(folder / "model_final.pth"), 4)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    damage(folder / "model_0000003.pth", how)
    caplog.clear()
    assert find_last_checkpoint(str(folder)) == (str(folder / "model_0000001.pth"), 2)
    named, instead = [record.getMessage() for record in caplog.records]
    assert f"'{folder / 'model_0000003.pth'}'" in named and "model_0000001.pth' instead" in instead
    damage(folder / "model_0000001.pth", "cut")
    with pytest.raises(UserError, match="model_0000003.pth.*; .*--overwrite starts anew"):
        find_last_checkpoint(str(folder))


def test_a_run_resumed_before_a_damaged_checkpoint_is_the_uninterrupted_run(short_run, tmp_path):
    train(short_run("mask_rcnn", "yaml", "straight"))
    with pytest.raises(PowerFailure):
        train(failing_after(short_run("mask_rcnn", "yaml", "broken"), batches=5))
    folder = tmp_path / "broken"
    damage(folder / "model_0000003.pth", "one bit")
    (folder / "last_checkpoint").unlink()
    train(short_run("mask_rcnn", "yaml", "broken"), resume=True)
    finals = [weights_of(tmp_path / run / "model_final.pth") for run in ("straight", "broken")]
    assert same_tensors(*finals)


def test_a_folder_without_checkpoints_is_where_a_resumed_run_begins(tmp_path):
    assert find_last_checkpoint(str(tmp_path)) == ("", 0)


def test_another_network_is_not_continued(short_run, tmp_path):
    train(short_run("mask_rcnn", "yaml", "run", "train.max_iter=2"))
    other = short_run("mask_rcnn", "yaml", "run", "MODEL.FPN.OUT_CHANNELS=32")
    with pytest.raises(UserError, match="of another network: it lacks .* e.g. 'backbone.fpn"):
        train(other, resume=True)
