"""The inference loop: modes of the model, and where progress is shown."""

import io
import sys

import pytest
import torch
from torch import nn

from d2ext.evaluation import run_inference

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

BATCHES = [["first"], ["second"]]


class Model(nn.Module):
    """Repeats its input and notes how it is run."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return [word.upper() for word in batch]


class Pairs(DatasetEvaluator):
    """Inputs and outputs as they come."""

    def reset(self):
        self.pairs = []

    def process(self, inputs, outputs):
        self.pairs += zip(inputs, outputs)

    def evaluate(self):
        return {"pairs": self.pairs}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_every_batch_is_processed_and_the_results_are_returned():
    results = run_inference(Model(), BATCHES, Pairs())
    assert results == {"pairs": [("first", "FIRST"), ("second", "SECOND")]}


def test_the_model_runs_without_gradients_in_evaluation_mode_and_returns_to_training():
    model = Model().train()
    run_inference(model, BATCHES, Pairs())
    assert model.modes == [(False, False)] * 2 and model.training


@pytest.mark.parametrize(
    "stream, main_process, shown",
    [(Terminal, True, True), (io.StringIO, True, False), (Terminal, False, False)],
)
def test_progress_is_shown_on_terminals_by_the_main_process(
    monkeypatch, stream, main_process, shown
):
    stream = stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(comm, "is_main_process", lambda: main_process)
    run_inference(Model(), BATCHES, Pairs(), "toy set")
    assert ("toy set" in stream.getvalue()) == shown
