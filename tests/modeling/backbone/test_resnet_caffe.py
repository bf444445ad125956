import math

import pytest
import torch

from d2ext.config import get_cfg
from d2ext.errors import UserError
from d2ext.modeling.backbone import CaffeResNet, EvalStatsBatchNorm2d

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone


def slim(**arguments):
    arguments = {"depth": 50, "stem_out_channels": 4, "res2_out_channels": 16, **arguments}
    return CaffeResNet(width_per_group=4, **arguments)


def feature_length(pixels):
    """The release's rule: a padless pool of 3 with stride 2 whose size is rounded up."""
    after_pool = math.ceil((math.ceil(pixels / 2) - 3) / 2) + 1
    return math.ceil(math.ceil(after_pool / 2) / 2)


@pytest.mark.parametrize("size", [(562, 1000), (600, 800), (333, 300), (48, 50)])
def test_feature_maps_have_the_sizes_of_the_release(size):
    with torch.device("meta"):
        features = CaffeResNet(depth=101)(torch.zeros(1, 3, *size))
    expected = tuple(feature_length(n) for n in size)
    assert features["res4"].shape == (1, 1024, *expected)
    assert features["res5"].shape == (1, 2048, *expected)


def test_pooling_of_the_stem_takes_the_first_three_columns_first():
    model = slim(norm="")
    with torch.no_grad():
        model.stem.conv1.weight.zero_()
        model.stem.conv1.weight[:, :, 3, 3] = 1  # the centre pixel of each window
    image = torch.rand(1, 3, 12, 16)
    rows = image.sum(1)[:, ::2, ::2]  # 6 x 8 before the pool
    pooled = model.stem(image)[0, 0]
    assert pooled.shape == (3, 4)
    for y in range(3):
        for x in range(4):
            window = rows[0, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            assert pooled[y, x] == window.max()


def test_all_convolutions_of_res5_are_dilated_and_have_no_stride():
    model = slim()
    for block in model.res5:
        assert block.conv2.dilation == (2, 2) and block.conv2.padding == (2, 2)
        assert block.conv1.stride == block.conv2.stride == (1, 1)
    assert model.res4[0].conv1.stride == (2, 2) and model.res4[0].conv2.stride == (1, 1)
    assert model.output_shape()["res5"].stride == 16
    assert slim(res5_dilation=1).output_shape()["res5"].stride == 32


def test_stem_and_res2_are_frozen_and_later_norms_are_trained_with_fixed_statistics():
    model = slim()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("res3", "res4", "res5")) for name in trained)
    assert {"res3.0.conv1.norm.weight", "res5.2.conv3.norm.bias"} <= trained
    assert isinstance(model.res2[0].conv1.norm, FrozenBatchNorm2d)
    norm = model.res3[0].conv1.norm
    assert isinstance(norm, EvalStatsBatchNorm2d)
    before = norm.running_mean.clone()
    model.train()(torch.rand(1, 3, 64, 64))["res5"].sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad is not None


def config(**resnets):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_caffe_resnet_backbone"
    for name, value in {"RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4, **resnets}.items():
        cfg.MODEL.RESNETS[name] = value
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    return cfg


def test_names_and_results_are_those_of_detectron2_without_the_caffe_pool():
    cfg = config(NORM="FrozenBN", RES5_DILATION=2)
    cfg.MODEL.CAFFE_RESNET.CEIL_POOL = False
    ours = build_backbone(cfg).eval()
    theirs = build_resnet_backbone(cfg, type("Shape", (), {"channels": 3})).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 66, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image))


def test_yaml_config_builds_the_same_network():
    yaml = build_backbone(config(NORM="EvalStatsBN", RES5_DILATION=2))
    lazy = slim()
    assert yaml.state_dict().keys() == lazy.state_dict().keys()
    lazy.load_state_dict(yaml.state_dict())
    image = torch.rand(1, 3, 50, 62)
    with torch.no_grad():
        torch.testing.assert_close(yaml(image), lazy(image))


@pytest.mark.parametrize("arguments", [{"depth": 18}, {"res5_dilation": 3}])
def test_impossible_networks_are_refused(arguments):
    with pytest.raises(UserError, match=str(*arguments.values())):
        slim(**arguments)
