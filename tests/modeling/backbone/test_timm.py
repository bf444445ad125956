"""Networks of timm under every kind of detector; nothing is downloaded."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import swin_t

from d2ext.engine import build_experiment
from d2ext.errors import UserError
from d2ext.modeling.backbone import SimpleFeaturePyramid, TimmBackbone, TimmFPN
from d2ext.modeling.backbone.timm import is_plain_vit, pixel_statistics
from d2ext.utils.testing import random_batch, tiny_config, training_losses

from detectron2.config import LazyCall, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model

timm = pytest.importorskip("timm")

STAGED = {
    "convnext_atto": [40, 80, 160, 320],
    "swin_tiny_patch4_window7_224": [96, 192, 384, 768],
    "mobilenetv4_conv_small": [32, 64, 96, 960],
    "resnet18.a1_in1k": [64, 128, 256, 512],
    "efficientnet_b0": [24, 40, 112, 320],
    "pvt_v2_b0": [32, 64, 160, 256],
}
PLAIN = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_224.mae",
]
SMALL = "convnext_atto"


def under_a_pyramid(name):
    if is_plain_vit(name):
        return SimpleFeaturePyramid(bottom_up=TimmBackbone(name=name), out_channels=16)
    return TimmFPN(bottom_up=TimmBackbone(name=name), out_channels=16)


@pytest.mark.parametrize("name", STAGED)
def test_channels_and_strides_are_what_timm_says(name):
    net = TimmBackbone(name=name).eval()
    shapes = net.output_shape()
    assert list(shapes) == ["res2", "res3", "res4", "res5"] and net.size_divisibility == 32
    assert [s.channels for s in shapes.values()] == STAGED[name]
    with torch.no_grad():
        out = net(torch.rand(1, 3, 96, 160))
    for key, shape in shapes.items():
        assert out[key].shape == (1, shape.channels, 96 // shape.stride, 160 // shape.stride)


@pytest.mark.parametrize("name", [*STAGED, *PLAIN])
def test_every_parameter_under_a_pyramid_gets_a_gradient(name):
    net = under_a_pyramid(name).train()
    out = net(torch.rand(1, 3, 64, 96))
    assert list(out) == ["p2", "p3", "p4", "p5", "p6"] == list(net.output_shape())
    assert [x.shape[-1] for x in out.values()] == [24, 12, 6, 3, 2]
    sum(x.square().mean() for x in out.values()).backward()
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_a_swin_transformer_is_that_of_the_paper_at_any_size():
    """torchvision's, built apart from timm's; its windows pad before they shift as well."""
    torch.manual_seed(0)
    ours, theirs = TimmBackbone(name="swin_tiny_patch4_window7_224").eval(), swin_t().eval()
    copied = {}
    for name, value in ours.net.state_dict().items():
        if name.startswith("patch_embed."):
            key = name.replace("patch_embed.proj", "features.0.0").replace(
                "patch_embed.norm", "features.0.2"
            )
        else:
            stage, rest = name.removeprefix("layers_").split(".", 1)
            if rest.startswith("downsample"):
                key = f"features.{2 * int(stage)}.{rest.removeprefix('downsample.')}"
            else:
                rest = rest.removeprefix("blocks.")
                rest = rest.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
                key = f"features.{2 * int(stage) + 1}.{rest}"
        copied[key] = value.flatten() if "position_index" in key else value
    missing, unexpected = theirs.load_state_dict(copied, strict=False)
    assert not unexpected and all(k.startswith(("norm.", "head.")) or "index" in k for k in missing)
    image = torch.rand(2, 3, 288, 352)  # maps of 72 x 88 and less: no multiples of 7
    with torch.no_grad():
        found = ours(image)
        x = image
        for number, layer in enumerate(theirs.features):
            x = layer(x)
            if number % 2:
                expected = x.permute(0, 3, 1, 2)
                torch.testing.assert_close(
                    found[f"res{2 + number // 2}"], expected, rtol=1e-5, atol=1e-5
                )
        as_in_timm = timm.create_model(
            "swin_tiny_patch4_window7_224",
            features_only=True,
            strict_img_size=False,
            always_partition=True,
        )
        as_in_timm.load_state_dict(ours.net.state_dict(), strict=False)
        shifted_first = as_in_timm.eval()(image)[-1].permute(0, 3, 1, 2)
    assert (shifted_first - found["res5"]).abs().max() > 1e-2


@pytest.mark.parametrize("freeze_at, first_free", [(0, "stem"), (1, "stages_0"), (3, "stages_2")])
def test_leading_stages_stay_as_they_are(freeze_at, first_free):
    net = TimmBackbone(name=SMALL, freeze_at=freeze_at).net
    free = [
        n.startswith("stem") and "stem" or n.split(".")[0]
        for n, p in net.named_parameters()
        if p.requires_grad
    ]
    assert free[0] == first_free
    frozen = sum(not p.requires_grad for p in net.parameters())
    assert all(not p.requires_grad for p in list(net.parameters())[:frozen])


def test_norms_are_fixed_and_added_as_asked():
    kept = TimmBackbone(name="resnet18", norm="")
    assert any(isinstance(m, nn.BatchNorm2d) for m in kept.modules())
    fixed = TimmBackbone(name="mobilenetv4_conv_small")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fixed.modules())
    normed = TimmBackbone(name=SMALL, out_norm="LN").eval()
    with torch.no_grad():
        out = normed(torch.rand(1, 3, 64, 64))
    for x in out.values():
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x.mean(1)), rtol=0, atol=1e-5)
    assert not TimmBackbone(name=SMALL).out_norms
    assert not isinstance(fixed, FrozenBatchNorm2d)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = TimmBackbone(name=SMALL, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        sum(x.square().mean() for x in net(torch.rand(1, 3, 64, 64)).values()).backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_a_file_are_loaded_and_tell_what_they_need(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("vit_tiny_patch16_224")
    path = str(tmp_path / "weights.pth")
    torch.save(whole.state_dict(), path)
    net = TimmBackbone(name="vit_tiny_patch16_224", pretrained=path)
    loaded = dict(net.net.named_parameters())
    assert torch.equal(loaded["model.blocks.3.mlp.fc1.weight"], whole.blocks[3].mlp.fc1.weight)
    assert net.needed_settings == {
        "input_format": "RGB",
        "pixel_mean": [127.5] * 3,
        "pixel_std": [127.5] * 3,
    }
    assert not TimmBackbone(name="vit_tiny_patch16_224").needed_settings
    assert pixel_statistics(SMALL)["std"] == [58.395, 57.12, 57.375]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "convnext_atom"}, "timm .* has no network 'convnext_atom' .such as convnext"),
        ({"name": SMALL, "out_features": ["res6"]}, "has no 'res6', but res2, res3, res4, res5"),
        ({"name": SMALL, "pretrained": "nowhere.pth"}, "there is no file 'nowhere.pth'"),
        ({"name": SMALL, "norm": "SyncBN"}, "NORM is 'SyncBN'"),
        ({"name": SMALL, "out_norm": "GN"}, "OUT_NORM is 'GN'"),
        ({"name": SMALL, "freeze_at": 6}, "FREEZE_AT is 6; it has to be 0 to 5"),
        ({"name": PLAIN[0], "freeze_at": 1}, "use SOLVER.FREEZE"),
        ({"name": "swin_tiny_patch4_window7_224", "output_stride": 16}, "cannot be a backbone"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        TimmBackbone(**arguments)
    assert "\n" not in str(error.value)


def test_without_timm_the_mend_is_one_line():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from d2ext.modeling.backbone import TimmBackbone\n"
        "from d2ext.errors import UserError\n"
        "try: TimmBackbone(name='convnext_atto')\n"
        "except UserError as e: print(e)"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert b"pip install timm" in result.stdout and result.stdout.count(b"\n") == 1


@pytest.mark.parametrize("name", [SMALL, PLAIN[0]])
def test_a_yaml_config_trains_and_predicts(name):
    cfg = tiny_config()
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.FPN.NORM, cfg.MODEL.ROI_HEADS.NAME = "LN", "StandardROIHeads"
    model = build_model(cfg)
    losses = training_losses(model, random_batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)
    with torch.no_grad():
        assert "instances" in model.eval()(random_batch(1))[0]


@pytest.mark.parametrize("project, name", [("HTC", "htc"), ("FCIS", "fcis"), ("MNC", "mnc")])
def test_networks_of_the_projects_take_them(project, name):
    config = f"projects/{project}/configs/{name}_tiny.yaml"
    experiment = build_experiment(
        config,
        [
            "MODEL.WEIGHTS=",
            "MODEL.DEVICE=cpu",
            "MODEL.BACKBONE.NAME=build_timm_fpn_backbone",
            "MODEL.TIMM.NAME=mobilenetv4_conv_small",
        ],
    )
    losses = training_losses(experiment.build_model(), random_batch(num_classes=8, num_labels=9))
    assert all(torch.isfinite(x) for x in losses.values())


def test_the_last_stage_can_be_dilated_to_stride_16():
    net = TimmBackbone(name=SMALL, output_stride=16, out_features=["res4", "res5"]).eval()
    assert [s.stride for s in net.output_shape().values()] == [16, 16]
    with torch.no_grad():
        assert [x.shape[-1] for x in net(torch.rand(1, 3, 64, 96)).values()] == [6, 6]
    with pytest.raises(UserError, match="strides that double"):
        TimmFPN(bottom_up=net)


def test_a_lazy_node_gives_the_same_network_as_yaml():
    cfg = tiny_config()
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.DROP_PATH = SMALL, 0.1
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME = (
        "build_timm_fpn_backbone",
        "StandardROIHeads",
    )
    node = LazyCall(TimmFPN)(
        bottom_up=LazyCall(TimmBackbone)(name=SMALL, drop_path=0.1), out_channels=8
    )
    torch.manual_seed(0)
    lazy = instantiate(node)
    torch.manual_seed(0)
    yaml = build_model(cfg).backbone
    assert lazy.state_dict().keys() == yaml.state_dict().keys()
    x = torch.rand(1, 3, 64, 64)
    lazy.load_state_dict(yaml.state_dict())
    with torch.no_grad():
        a, b = lazy.eval()(x), yaml.eval()(x)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", [SMALL, "swin_tiny_patch4_window7_224", PLAIN[0]])
def test_bfloat16_gives_finite_features_and_gradients(name):
    net = under_a_pyramid(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum(x.float().square().mean() for x in net(torch.rand(1, 3, 64, 64)).values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_yaml_keys_reach_the_network(tmp_path):
    cfg = tiny_config()
    net = cfg.MODEL.TIMM
    net.NAME, net.PRETRAINED, net.OUTPUT_STRIDE, net.CHECKPOINTING = SMALL, "file.pth", 16, True
    net.OUT_FEATURES, net.FREEZE_AT = ["res4"], 1
    arguments = TimmBackbone.from_config(cfg, ShapeSpec(channels=3))
    assert arguments["pretrained"] == "file.pth"
    cfg.MODEL.WEIGHTS = "whole.pth"  # then weights of a part are not needed
    arguments = TimmBackbone.from_config(cfg, ShapeSpec(channels=3))
    assert arguments["pretrained"] == "" and arguments["output_stride"] == 16
    built = TimmBackbone(cfg, ShapeSpec(channels=3))
    assert built.net.grad_checkpointing and list(built.output_shape()) == ["res4"]
    assert not built.net.stem_0.weight.requires_grad
