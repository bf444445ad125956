"""Every family of timm's backbones at the sizes of training, and FCIS and MNC over them, which need
one map of stride 16 or a level of a pyramid. Nothing is downloaded."""

import pytest
import torch

from d2ext.engine import build_experiment
from d2ext.errors import UserError
from d2ext.modeling.backbone import SimpleFeaturePyramid, TimmBackbone, TimmFPN
from d2ext.modeling.backbone.timm import is_plain_vit
from d2ext.utils.testing import random_batch, training_losses

pytest.importorskip("timm")

FAMILIES = [
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
    "mobilenetv4_conv_medium",
    "vit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_224.mae",
    "samvit_base_patch16",
]


def under_a_pyramid(name, **options):
    kind = SimpleFeaturePyramid if is_plain_vit(name) else TimmFPN
    return kind(bottom_up=TimmBackbone(name=name, **options), out_channels=8)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("height, width", [(64, 64), (800, 1088)])
def test_maps_have_their_sizes_without_any_values(name, height, width):
    with torch.device("meta"), torch.no_grad():
        out = under_a_pyramid(name).eval()(torch.empty(1, 3, height, width))
    for level in range(2, 7):
        stride = 2**level
        assert out[f"p{level}"].shape == (1, 8, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "vit_small_patch16_dinov3"])
def test_in_bfloat16_values_are_near_those_in_float32(name):
    torch.manual_seed(0)
    net, image = under_a_pyramid(name).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        exact = net(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = net(image)
    for level, x in exact.items():
        difference = (rounded[level].float() - x).norm() / x.norm()
        assert difference < 0.05, level


# Networks on one map of stride 16: the last stage dilated, the fourth level of a pyramid, a ViT's.
DILATED = ["MODEL.BACKBONE.NAME=build_timm_backbone", "MODEL.TIMM.OUTPUT_STRIDE=16"]
MAPS = {
    "convnext_atto": ("res4", "res5", DILATED),
    "efficientnet_b0": ("res4", "res5", DILATED),
    "pvt_v2_b0": ("p4", "p4", ["MODEL.BACKBONE.NAME=build_timm_fpn_backbone"]),
    "vit_tiny_patch16_224": ("last", "last", ["MODEL.BACKBONE.NAME=build_timm_backbone"]),
}


def network(project, name):
    first, last, options = MAPS[name]
    keys = {
        "fcis": [f"MODEL.RPN.IN_FEATURES=['{first}']", f"MODEL.FCIS.IN_FEATURE={last}"],
        "mnc": [f"MODEL.RPN.IN_FEATURES=['{last}']", f"MODEL.ROI_HEADS.IN_FEATURES=['{last}']"],
    }
    maps = sorted({first, last}) if project == "fcis" else [last]
    kept = [] if maps[0] in ("p4", "last") else [f"MODEL.TIMM.OUT_FEATURES={maps}"]
    return build_experiment(
        f"projects/{project.upper()}/configs/{project}_tiny.yaml",
        ["MODEL.WEIGHTS=", "MODEL.DEVICE=cpu", f"MODEL.TIMM.NAME={name}", *options, *kept]
        + [*keys[project], "MODEL.TIMM.OUT_NORM=LN"],
    ).build_model()


@pytest.mark.parametrize(
    "project, name",
    [
        ("fcis", "convnext_atto"),
        ("fcis", "pvt_v2_b0"),
        ("fcis", "vit_tiny_patch16_224"),
        ("mnc", "convnext_atto"),
        ("mnc", "efficientnet_b0"),
        ("mnc", "pvt_v2_b0"),
    ],
)
def test_fcis_and_mnc_train_on_a_map_of_stride_16(project, name):
    model = network(project, name)
    stride = {x.stride for x in model.backbone.output_shape().values()}
    assert stride == {16} or MAPS[name][0] == "p4"
    losses = training_losses(model, random_batch(num_classes=8, num_labels=9, size=(96, 128)))
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # With several processes, which wait for all, losses are connected with levels that none reads.
    levels = ("backbone.fpn_", "backbone.bottom_up.out_norms.")
    assert all(n.startswith(levels) for n in missing) and (not missing or "pvt" in name)


def test_what_cannot_be_dilated_says_what_to_take_instead():
    with pytest.raises(UserError, match="cannot be a backbone .* take level p4") as error:
        TimmBackbone(name="swin_tiny_patch4_window7_224", output_stride=16)
    assert "\n" not in str(error.value)
