"""The ResNet variant, at a fraction of its width."""

import pickle

import pytest
import torch

from d2ext.checkpoint import Checkpointer
from d2ext.utils.testing import random_batch, training_losses

from tests.projects.mnc.helpers import make_model

NARROW = (
    *("BACKBONE.NAME", "build_caffe_resnet_backbone"),
    *("RESNETS.DEPTH", 50, "RESNETS.STEM_OUT_CHANNELS", 8, "RESNETS.RES2_OUT_CHANNELS", 8),
    *("RESNETS.WIDTH_PER_GROUP", 4, "RESNETS.OUT_FEATURES", ["res4"], "RESNETS.NORM", "FrozenBN"),
    *("RESNETS.RES5_DILATION", 1, "RPN.IN_FEATURES", ["res4"], "ROI_HEADS.IN_FEATURES", ["res4"]),
    *("CAFFE_RESNET.CEIL_POOL", False, "MNC.CATEGORY_HEAD", "MNCRes5CategoryHead"),
)


@pytest.fixture
def narrow():
    return lambda **kwargs: make_model(*NARROW, **kwargs)


def test_network_trains_and_predicts(narrow):
    model, batch = narrow(), random_batch(2)
    losses = training_losses(model, batch)
    assert len(losses) == 10 and all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    head = model.roi_heads.category_head
    assert head.mask_res5[0].conv1.weight.grad.abs().max() > 0
    assert head.res5[0].conv1.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert len(model.eval()(batch)) == 2


def test_both_fifth_stages_start_from_the_pretrained_one(narrow, tmp_path):
    source, model = narrow(seed=1), narrow(seed=2)
    prefixes = {"backbone.": "", "roi_heads.category_head.res5.": "res5."}
    weights = {
        new + key[len(old) :]: value.numpy()
        for old, new in prefixes.items()
        for key, value in source.state_dict().items()
        # The published files have no statistics of norms: they are part of scale and bias.
        if key.startswith(old) and "running" not in key
    }
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "matching_heuristics": True}))
    Checkpointer(model).load(str(path))
    found, expected = model.state_dict(), source.state_dict()
    for key, value in expected.items():
        if key.startswith(tuple(prefixes)) and "running" not in key:
            assert found[key].equal(value), key
    head = model.roi_heads.category_head
    for key, value in head.res5.state_dict().items():
        assert head.mask_res5.state_dict()[key].equal(value)
