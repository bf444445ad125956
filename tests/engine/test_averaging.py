"""The average of the weights: its rule, where it is kept, and resuming."""

import pytest
import torch

from d2ext.engine import Predictor, loop, train
from d2ext.engine.averaging import WeightAverage

from tests.engine.test_resume import PowerFailure, failing_after, same_tensors

KEYS = {"yaml": "SOLVER.EMA_DECAY=0.9", "py": "train.ema_decay=0.9"}


class Net(torch.nn.Module):
    """Weights, statistics of batch norm, and whole numbers that a sum would spoil."""

    def __init__(self):
        super().__init__()
        self.line, self.norm = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
        self.register_buffer("sizes", torch.tensor([7, 11]))


def test_the_average_follows_the_rule_for_weights_and_statistics():
    model, decay, expected = Net(), 0.3, {}
    average = WeightAverage(model, decay)
    for n in range(6):
        for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
            tensor.data = torch.rand_like(tensor)
        model.norm.num_batches_tracked += 1
        average.after_step()
        kept = min(decay, (1 + n) / (10 + n)) if n else 0
        for key, value in model.state_dict().items():
            value = value.clone().double()
            whole = key in ("sizes", "norm.num_batches_tracked")
            old = expected.get(key, value)
            expected[key] = value if whole else kept * old + (1 - kept) * value
    found = average.weights()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=0, atol=1e-6)
    assert not torch.equal(found["line.weight"], model.line.weight)


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_training_is_the_same_and_its_checkpoints_hold_the_average_and_the_weights(
    short_run, tmp_path, kind
):
    train(short_run("mask_rcnn", kind, "plain"))
    train(short_run("mask_rcnn", kind, "run", KEYS[kind]))
    plain, run = final(tmp_path / "plain"), final(tmp_path / "run")
    assert "ema" not in plain and run["ema"]["steps"] == 6
    assert same_tensors(run["ema"]["trained"], plain["model"])
    assert run["model"].keys() == plain["model"].keys()
    assert not same_tensors(run["model"], plain["model"])
    predictor = Predictor.from_weights(str(tmp_path / "run/model_final.pth"))
    assert same_tensors(predictor.model.state_dict(), run["model"])


def test_what_is_evaluated_is_the_average(short_run, tmp_path, monkeypatch):
    seen = {}

    def evaluate(experiment, model):
        seen.update({k: v.clone() for k, v in model.state_dict().items()})
        return {}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    train(short_run("mask_rcnn", "yaml", "run", KEYS["yaml"], "DATASETS.TEST=shapes_few"))
    assert same_tensors(seen, final(tmp_path / "run")["model"])


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(short_run, tmp_path, kind):
    train(short_run("mask_rcnn", kind, "straight", KEYS[kind]))
    with pytest.raises(PowerFailure):
        train(failing_after(short_run("mask_rcnn", kind, "broken", KEYS[kind]), batches=5))
    train(short_run("mask_rcnn", kind, "broken", KEYS[kind]), resume=True)
    straight, broken = final(tmp_path / "straight"), final(tmp_path / "broken")
    assert same_tensors(straight["model"], broken["model"])
    assert same_tensors(straight["ema"]["trained"], broken["ema"]["trained"])
    assert straight["ema"]["steps"] == broken["ema"]["steps"] == 6


def test_an_average_may_begin_or_end_when_a_run_is_resumed(short_run, tmp_path, caplog):
    train(short_run("mask_rcnn", "yaml", "ends", KEYS["yaml"], "SOLVER.MAX_ITER=4"))
    train(short_run("mask_rcnn", "yaml", "never", "SOLVER.MAX_ITER=4"))
    for folder in ("ends", "never"):
        train(short_run("mask_rcnn", "yaml", folder), resume=True)
    # It goes on from the weights of the optimiser, not from their average.
    assert same_tensors(final(tmp_path / "ends")["model"], final(tmp_path / "never")["model"])
    assert "has an average of the weights, which ends" in caplog.text
    train(short_run("mask_rcnn", "yaml", "never", KEYS["yaml"], "SOLVER.MAX_ITER=7"), resume=True)
    assert "has no average of the weights: it starts here" in caplog.text
    assert final(tmp_path / "never")["ema"]["steps"] == 1
