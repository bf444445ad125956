"""How often a training step waits for the device, and how many operators it launches: a bound for
each network, and the same however many objects there are. On a device this is the time of a step.
"""

import functools

import pytest
import torch

from d2ext.engine import build_experiment
from d2ext.utils.testing import count_operators, random_batch

from detectron2.utils.events import EventStorage

HTC = "projects/HTC/configs/htc_tiny.yaml"
MNC = "projects/MNC/configs/mnc_tiny.yaml"
FCIS = "projects/FCIS/configs/fcis_tiny.yaml"


@functools.cache
def step(config, num_objects):
    """Operators of the forward pass, and waits of a whole step, with 4 images."""
    torch.manual_seed(0)
    model = build_experiment(config, ["MODEL.WEIGHTS=", "MODEL.DEVICE=cpu"]).build_model().train()
    batch = random_batch(4, size=(96, 128), num_objects=num_objects)
    with EventStorage(), count_operators() as counts:
        losses = model(batch)
        forward = counts.operators
        sum(losses.values()).backward()
    return forward, sum(counts.syncs.values())


@pytest.mark.parametrize(
    "config, operators, syncs",
    [
        # Of these, detectron2's ROIPooler takes more than 400 and 36.
        (HTC, 2500, 50),
        (MNC, 2500, 30),
        (FCIS, 1500, 30),
    ],
)
def test_a_training_step_keeps_the_device_busy(config, operators, syncs):
    found = step(config, 3)
    assert found[0] <= operators and found[1] <= syncs


@pytest.mark.parametrize("config", [HTC, MNC, FCIS])
def test_more_objects_are_no_more_operators(config):
    assert step(config, 3) == step(config, 20)
