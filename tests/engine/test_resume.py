"""A run that is interrupted and resumed is the run that was never interrupted."""

import itertools

import pytest
import torch

from d2ext.engine import train

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
