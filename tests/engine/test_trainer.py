"""NaN and infinite losses: named with their images, or left out and counted."""

import json
import re

import pytest
import torch

from d2ext.engine import train
from d2ext.engine.trainer import MAX_SKIPPED_IN_A_ROW, CheckedTrainer
from d2ext.errors import UserError

from detectron2.utils.events import EventStorage


def spoiling(experiment, iterations):
    """Let a loss be NaN in some iterations of a run."""
    build = experiment.build_model

    def build_spoiled():
        model, calls = build(), iter(range(10**6))
        forward = model.forward

        def spoiled(batch):
            losses = forward(batch)
            if next(calls) in iterations:
                losses["loss_cls"] = losses["loss_cls"] * float("nan")
            return losses

        model.forward = spoiled
        return model

    experiment.build_model = build_spoiled
    return experiment


def test_a_nan_loss_is_one_line_with_the_images_and_a_file_to_reproduce_it(
    short_run, tmp_path, caplog
):
    with pytest.raises(UserError) as caught:
        train(spoiling(short_run("mask_rcnn", "yaml", "run"), {3}))
    assert "Exception during training" not in caplog.text  # with its traceback
    message = str(caught.value)
    assert "\n" not in message and "in iteration 3: loss_cls nan (finite: loss_box_reg" in message
    assert re.search(r"learning rate \d", message) and "SOLVER.SKIP_NONFINITE=true" in message
    path = tmp_path / "run/nonfinite_0000003.pth"
    assert f"'{path}'" in message
    kept = torch.load(path, weights_only=False)
    assert kept["iteration"] == 3 and torch.tensor(kept["losses"]["loss_cls"]).isnan()
    assert len(kept["batch"]) == 2
    for image in kept["batch"]:
        assert f"{image['image_id']} ({image['file_name']})" in message
    # The weights are those before the step: the batch gives the loss that was finite.
    model = short_run("mask_rcnn", "yaml", "again").build_model()
    model.load_state_dict(kept["model"])
    with EventStorage(), torch.no_grad():
        losses = model(kept["batch"])
    assert float(losses["loss_mask"]) == pytest.approx(kept["losses"]["loss_mask"], rel=0.2)


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_such_batches_are_left_out_and_counted_on_request(short_run, tmp_path, kind):
    key = {"yaml": "SOLVER.SKIP_NONFINITE=true", "py": "train.skip_nonfinite=true"}[kind]
    train(spoiling(short_run("mask_rcnn", kind, "run", key), {0, 3}))
    lines = map(json.loads, (tmp_path / "run/metrics.json").read_text().splitlines())
    counts = {x["iteration"]: x["skipped_iterations"] for x in lines if "skipped_iterations" in x}
    assert counts == {0: 1, 3: 2}
    last = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert last["trainer"]["skipped_iterations"] == 2
    assert all(x.isfinite().all() for x in last["model"].values())


FAR = 1e30


class Small(torch.nn.Module):
    """Two losses of numbers; as an RPN, it gives none if the numbers are beyond all measure."""

    def __init__(self):
        super().__init__()
        self.norm, self.line = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)

    def forward(self, batch):
        if any(x["image"].max() == FAR for x in batch):
            raise FloatingPointError("Predicted boxes contain Inf or NaN.")
        numbers = self.line(self.norm(torch.stack([x["image"] for x in batch])))
        return {"loss_a": numbers.square().mean(), "loss_b": numbers.mean() * 0 + 1}


def small_trainer(tmp_path, values, **options):
    """A trainer of `Small` whose images have the given values added to them."""
    batches = [
        [
            {"image": torch.tensor([1.0, 2.0 * n]) + v, "image_id": n, "file_name": f"{n}.jpg"}
            for n in range(3)
        ]
        for v in values
    ]
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return CheckedTrainer(model, batches, optimizer, output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), FAR])
def test_a_left_out_batch_changes_no_weight_and_no_statistics(tmp_path, value):
    trainer = small_trainer(tmp_path, [0.0, value, 1.0], skip=True)
    plain = small_trainer(tmp_path, [0.0, 1.0])
    plain.model.load_state_dict(trainer.model.state_dict())
    with EventStorage():
        for each, steps in ((trainer, 3), (plain, 2)):
            for each.iter in range(steps):
                each.run_step()
    one, other = trainer.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert list(tmp_path.iterdir()) == []


def test_too_many_left_out_batches_in_a_row_end_the_training(tmp_path):
    values = [0.0, *[float("nan")] * (MAX_SKIPPED_IN_A_ROW + 1)]
    trainer = small_trainer(tmp_path, values, skip=True)
    with EventStorage():
        for trainer.iter in range(MAX_SKIPPED_IN_A_ROW + 1):
            trainer.run_step()
        trainer.iter += 1
        with pytest.raises(UserError, match="the cause is not the data") as caught:
            trainer.run_step()
    assert "images 0 (0.jpg), 1 (1.jpg), 2 (2.jpg)" in str(caught.value)


def test_a_network_that_gives_no_loss_is_one_line_with_the_images(tmp_path):
    trainer = small_trainer(tmp_path, [FAR])
    trainer.iter = 0
    with EventStorage(), pytest.raises(UserError) as caught:
        trainer.run_step()
    assert "iteration 0: Predicted boxes contain Inf or NaN, images 0 (0.jpg)" in str(caught.value)
    assert "learning rate 0.1" in str(caught.value) and "\n" not in str(caught.value)
    assert len(torch.load(tmp_path / "nonfinite_0000000.pth")["batch"]) == 3
