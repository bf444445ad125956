"""The lines about a run: what weights are used, how long it is."""

import logging
import re

import pytest
import torch
from torch import nn

from d2ext.engine.summary import SummingCheckpointer, log_model, log_schedule


def network(classes, **more):
    parts = {"backbone": nn.Linear(3, 3), "head": nn.Linear(3, classes), **more}
    return nn.ModuleDict(parts)


@pytest.fixture
def weights(tmp_path):
    SummingCheckpointer(network(4), str(tmp_path)).save("weights")
    return str(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "model, level, words",
    [
        (network(4), "INFO", ": 4 of 4 arrays of the model"),
        (network(4, mask=nn.Linear(2, 2)), "INFO", "4 of 6 arrays of the model; anew start mask"),
        (network(5), "WARNING", "2 of 4 .* anew start head .*2 of these have another shape"),
    ],
)
def test_weights_that_start_anew_are_one_line(weights, caplog, model, level, words):
    with caplog.at_level(logging.INFO):
        SummingCheckpointer(model).load(weights, checkpointables=[])
    lines = [r for r in caplog.records if r.name == "d2ext.engine.summary"]
    assert len(lines) == 1 and lines[0].levelname == level
    assert re.search(words, lines[0].getMessage())


def test_weights_that_the_model_does_not_have_are_named(weights, caplog):
    with caplog.at_level(logging.INFO):
        SummingCheckpointer(nn.ModuleDict({"backbone": nn.Linear(3, 3)})).load(weights, [])
    assert "not used are head (2)" in caplog.text


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_size_and_schedule_are_told(short_run, caplog, kind):
    experiment = short_run("mask_rcnn", kind, "run")
    model = nn.Linear(1000, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with caplog.at_level(logging.INFO):
        log_model(experiment, model)
        log_schedule(experiment, optimizer, start_iter=3, num_images=4)
    assert "model Linear: 0.01 million parameters, 8 classes" in caplog.text
    assert "6 iterations of 2 images (3.0 epochs), continued at 3, AdamW, learning rate 0.5" in (
        caplog.text
    )
    assert "checkpoints every 2 iterations, the last 3 kept; no evaluation" in caplog.text
