import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.modeling.backbone import (
    DeformBottleneckBlock,
    EvalStatsBatchNorm2d,
    ResNetFPN,
    SlimResNetFPN,
)
from d2ext.utils.testing import tiny_config

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

STAGES = ["res2", "res3", "res4", "res5"]


def resnet_config(name):
    cfg = tiny_config()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    resnets = cfg.MODEL.RESNETS
    resnets.OUT_FEATURES = STAGES
    resnets.NORM = "FrozenBN"
    resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS = 8, 16
    resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = 2, 2
    resnets.STRIDE_IN_1X1 = False
    return cfg


def test_it_equals_detectron2s_resnet_fpn():
    ours = build_backbone(resnet_config("build_deform_resnet_fpn_backbone"))
    theirs = build_backbone(resnet_config("build_resnet_fpn_backbone"))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    a, b = ours(x), theirs(x)
    assert list(a) == list(b) == ["p2", "p3", "p4", "p5", "p6"]
    assert all(torch.equal(a[k], b[k]) for k in a)
    trainable = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert trainable == [n for n, p in theirs.named_parameters() if p.requires_grad]


def test_deformable_stages_from_yaml_train_on_the_cpu():
    cfg = resnet_config("build_deform_resnet_fpn_backbone")
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, True, True]
    model = build_backbone(cfg)
    kinds = [
        isinstance(block, DeformBottleneckBlock)
        for name in STAGES
        for block in getattr(model.bottom_up, name)
    ]
    assert kinds == [False] * 7 + [True] * 9
    model(torch.randn(1, 3, 64, 64))["p4"].square().sum().backward()
    assert model.bottom_up.res4[0].conv2_offset.weight.grad.abs().sum() > 0


def test_eval_stats_norm_leaves_the_frozen_stages_frozen():
    cfg = resnet_config("build_deform_resnet_fpn_backbone")
    cfg.MODEL.RESNETS.NORM = "EvalStatsBN"
    bottom_up = build_backbone(cfg).bottom_up
    assert isinstance(bottom_up.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(bottom_up.res2[0].conv1.norm, FrozenBatchNorm2d)
    assert isinstance(bottom_up.res3[0].conv1.norm, EvalStatsBatchNorm2d)
    assert not any(p.requires_grad for p in bottom_up.res2.parameters())
    assert all(p.requires_grad for p in bottom_up.res3.parameters())


def test_state_dict_names_do_not_depend_on_the_norm():
    names = []
    for norm in ("FrozenBN", "EvalStatsBN"):
        cfg = resnet_config("build_deform_resnet_fpn_backbone")
        cfg.MODEL.RESNETS.NORM = norm
        names.append(set(build_backbone(cfg).state_dict()))
    assert names[0] == names[1]


def test_yaml_and_lazy_build_the_same_resnet():
    lazy = instantiate(
        L(ResNetFPN)(
            stem_out_channels=8,
            res2_out_channels=16,
            num_groups=2,
            width_per_group=2,
            deform_on_per_stage=[False, True, False, False],
            out_channels=8,
        )
    )
    cfg = resnet_config("build_deform_resnet_fpn_backbone")
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, False, False]
    yaml = build_backbone(cfg)
    lazy.load_state_dict(yaml.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(lazy(x)["p3"], yaml(x)["p3"])


def test_yaml_and_lazy_build_the_same_slim_resnet():
    lazy = instantiate(
        L(SlimResNetFPN)(
            stem_channels=8,
            stage_channels=[8, 16, 8, 16],
            stage_blocks=[1, 1, 1, 1],
            out_channels=8,
        )
    )
    yaml = build_backbone(tiny_config())
    lazy.load_state_dict(yaml.state_dict())
    x = torch.randn(2, 3, 64, 96)
    a, b = lazy(x), yaml(x)
    sizes = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2)}
    assert {k: tuple(v.shape) for k, v in a.items()} == {k: (2, 8, *s) for k, s in sizes.items()}
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_output_shapes_state_channels_and_strides():
    model = SlimResNetFPN(stage_channels=(8, 16), stage_blocks=(1, 1), out_channels=4)
    shapes = {k: (v.channels, v.stride) for k, v in model.output_shape().items()}
    assert shapes == {"p2": (4, 4), "p3": (4, 8), "p4": (4, 16)}
    features = model(torch.randn(1, 3, 64, 64))
    assert {k: (v.shape[1], 64 // v.shape[2]) for k, v in features.items()} == shapes


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "EvalStatsBN"])
def test_slim_net_accepts_every_norm(norm):
    model = SlimResNetFPN(stage_channels=(8, 16, 32, 64), stage_blocks=(1, 1, 1, 1), norm=norm)
    assert model(torch.randn(2, 3, 64, 64))["p5"].shape == (2, 64, 2, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stage_channels": (8, 16, 16)}, "differ in length"),
        ({"stage_channels": (8, 16, 16, 32)}, "must differ between neighbours"),
    ],
)
def test_impossible_slim_nets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlimResNetFPN(**arguments)


def test_unsupported_depth_and_dilation_are_refused():
    with pytest.raises(ValueError, match="depth 18"):
        ResNetFPN(depth=18)
    cfg = resnet_config("build_deform_resnet_fpn_backbone")
    cfg.MODEL.RESNETS.RES5_DILATION = 2
    with pytest.raises(ValueError, match="MODEL.RESNETS.RES5_DILATION 1"):
        build_backbone(cfg)
