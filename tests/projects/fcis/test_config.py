"""Keys, and what the full-size configs say: network, images and optimiser of the release."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from d2ext.config import get_cfg, load_config
from d2ext.modeling.backbone import CaffeResNet
from d2ext.projects.fcis import FCISROIHeads, add_fcis_config
from d2ext.projects.fcis import config as fcis_config
from d2ext.solver import build_optimizer
from d2ext.solver.schedule import build_lr_multiplier

from detectron2.config import instantiate
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import build_proposal_generator

from tests.projects.fcis.helpers import make_config

CONFIGS = Path(__file__).resolve().parents[3] / "projects" / "FCIS" / "configs"


def read(name):
    return load_config(CONFIGS / name, [])


def test_there_are_at_most_forty_keys_and_each_has_a_comment():
    lines = [x.strip() for x in inspect.getsource(fcis_config).splitlines()]
    keys = [i for i, x in enumerate(lines) if re.match(r"fcis\.[A-Z0-9_]+ = ", x)]
    assert 10 < len(keys) <= 40
    for i in keys:
        assert lines[i - 1].startswith("#") or i - 1 in keys, lines[i]


def test_keys_of_detectron2_stay_as_they_are():
    ours, plain = get_cfg(), get_cfg()
    add_fcis_config(ours)
    for cfg in (ours, plain):
        cfg.MODEL.pop("FCIS", None)
    assert ours == plain


def test_lazy_defaults_equal_the_yaml_defaults():
    cfg = get_cfg()
    add_fcis_config(cfg)
    own = cfg.MODEL.FCIS
    signature = inspect.signature(FCISROIHeads.__init__).parameters
    for argument, value in {
        "in_feature": own.IN_FEATURE,
        "conv_dim": own.CONV_DIM,
        "conv_kernel": own.CONV_KERNEL,
        "group_size": own.GROUP_SIZE,
        "out_size": own.OUT_SIZE,
        "joint": own.JOINT,
        "inclusive": own.INCLUSIVE,
        "ohem": own.OHEM,
        "loss_weights": tuple(own.LOSS_WEIGHTS),
        "refine": own.REFINE,
        "min_size_test": own.MIN_SIZE_TEST,
        "vote": own.VOTE,
    }.items():
        assert signature[argument].default == value, argument


# ------------------------------------------------------------------------------------- network

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def expected_shapes(depth, num_classes, num_anchors):
    """The release's parameters under detectron2's names, with a one-logit objectness and without
    the box maps of the background."""
    shapes = {"backbone.stem.conv1.weight": (64, 3, 7, 7)}
    norms = {"backbone.stem.conv1": 64}
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        middle = 64 * 2**stage
        for block in range(blocks):
            prefix = f"backbone.res{stage + 2}.{block}"
            convs = {
                "conv1": (middle, channels, 1, 1),
                "conv2": (middle, middle, 3, 3),
                "conv3": (4 * middle, middle, 1, 1),
            }
            if block == 0:
                convs["shortcut"] = (4 * middle, channels, 1, 1)
            for name, shape in convs.items():
                shapes[f"{prefix}.{name}.weight"] = shape
                norms[f"{prefix}.{name}"] = shape[0]
            channels = 4 * middle
    for conv, width in norms.items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{conv}.norm.{name}"] = (width,)
    for conv, shape in {
        "proposal_generator.rpn_head.conv": (512, 1024, 3, 3),
        "proposal_generator.rpn_head.objectness_logits": (num_anchors, 512, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas": (4 * num_anchors, 512, 1, 1),
        "roi_heads.conv_new": (1024, 2048, 1, 1),
        "roi_heads.cls_seg": (98 * (num_classes + 1), 1024, 1, 1),
        "roi_heads.bbox": (196, 1024, 1, 1),
    }.items():
        shapes[f"{conv}.weight"], shapes[f"{conv}.bias"] = shape, shape[:1]
    return shapes


@pytest.mark.parametrize(
    "name, depth, classes, anchors",
    [
        ("fcis_R_101_coco", 101, 80, 12),
        ("fcis_R_101_voc_sds", 101, 20, 9),
        ("fcis_R_50_coco", 50, 80, 12),
        ("fcis_R_152_coco", 152, 80, 12),
    ],
)
def test_parameters_are_those_of_the_release(name, depth, classes, anchors):
    with torch.device("meta"):
        model = instantiate(read(f"{name}.py").model)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes == expected_shapes(depth, classes, anchors)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert not any(k.startswith(("backbone.stem", "backbone.res2")) for k in trained)
    frozen = {k for k in shapes if k not in trained}
    assert all(k.startswith(("backbone.stem", "backbone.res2")) or "running" in k for k in frozen)
    if depth == 101:
        convs = sum(
            math.prod(s) for k, s in shapes.items() if k.startswith("backbone") and len(s) == 4
        )
        assert convs == 42_394_816
        heads = sum(math.prod(s) for k, s in shapes.items() if not k.startswith("backbone"))
        dropped = 196 * 1025 + anchors * 513
        assert heads + dropped == {80: 15_392_466, 20: 9_356_232}[classes]


@pytest.mark.parametrize("name", ["fcis_R_101_coco", "fcis_R_101_voc_sds"])
def test_yaml_configs_build_the_same_parameters_without_clamping(name):
    cfg = read(f"{name}.yaml")
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
        lazy = instantiate(read(f"{name}.py").model)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, lazy)]
    assert shapes[0] == shapes[1]
    assert model.proposal_generator.box2box_transform.scale_clamp == math.inf
    assert model.roi_heads.box2box_transform.scale_clamp == math.inf


@pytest.mark.parametrize(
    "name, change",
    [
        ("translation_invariant_R_101_voc_sds", ("GROUP_SIZE", 1)),
        ("separate_R_101_voc_sds", ("JOINT", False)),
        ("paper_losses_R_101_voc_sds", ("LOSS_WEIGHTS", [1.0, 1.0, 1.0])),
        ("random_sampling_R_101_coco", ("OHEM", False)),
    ],
)
def test_an_ablation_differs_in_one_key(name, change):
    base = read(f"fcis_R_101_{name.rsplit('R_101_')[-1]}.yaml")
    ablation = read(f"fcis_ablation_{name}.yaml")
    key, value = change
    assert ablation.MODEL.FCIS[key] == value != base.MODEL.FCIS[key]
    ablation.MODEL.FCIS[key] = base.MODEL.FCIS[key]
    ablation.OUTPUT_DIR = base.OUTPUT_DIR
    assert ablation == base


# -------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("is_train", [True, False])
def test_images_are_resized_as_in_the_release(vectors, is_train):
    inputs, expected = vectors["image_21_prep"]
    cfg = read("fcis_R_101_coco.yaml")
    cfg.INPUT.RANDOM_FLIP = "none"
    augmentations = AugmentationList(build_augmentation(cfg, is_train))
    model = build_rpn(cfg)
    for entry in expected["per_size"]:
        image = AugInput(np.zeros((*entry["orig"], 3), np.uint8))
        augmentations(image)
        height, width = image.image.shape[:2]
        assert [height, width] == entry["resized"]
        with torch.device("meta"):
            features = CaffeResNet(depth=50)(torch.zeros(1, 3, height, width))["res4"]
        assert list(features.shape[2:]) == entry["feature"]
        usable = model.usable_anchors(features.shape[2:], (height, width), torch.device("cpu"))
        assert len(usable) == 12 * math.prod(entry["proposal_grid"])


def build_rpn(cfg):
    return build_proposal_generator(cfg, {"res4": ShapeSpec(channels=8, stride=16)})


def test_pixel_means_are_those_of_the_release_in_the_order_of_the_weights(vectors):
    inputs, expected = vectors["image_21_prep"]
    cfg = read("fcis_R_101_coco.yaml")
    assert cfg.INPUT.FORMAT == "BGR" and cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    normalised = np.array(inputs["bgr_pixel"]) - cfg.MODEL.PIXEL_MEAN
    assert normalised[::-1] == pytest.approx(expected["rgb_minus_mean"])


def test_anchors_are_those_of_the_release(vectors):
    inputs, expected = vectors["rpn_16_anchors"]
    for name, data in (("fcis_R_101_coco", "coco"), ("fcis_R_101_voc_sds", "voc")):
        rpn = build_rpn(read(f"{name}.yaml"))
        boxes = rpn.anchor_generator([torch.zeros(1, 1, 1, 1)])[0].tensor
        assert (boxes - torch.tensor([0.0, 0, 1, 1])).tolist() == expected[data]


# ----------------------------------------------------------------------------------- optimiser


class TwoLayers(nn.Module):
    """A head of one value, and the layer with the larger learning rate."""

    def __init__(self, value):
        super().__init__()
        self.roi_heads = nn.Module()
        for name in ("conv_new", "cls_seg"):
            layer = nn.Conv2d(1, 1, 1)
            nn.init.constant_(layer.weight, value)
            nn.init.constant_(layer.bias, value)
            setattr(self.roi_heads, name, layer)


def test_steps_on_averaged_gradients_are_those_on_summed_ones(vectors):
    inputs, expected = vectors["solver_24_sum_vs_mean"]
    cfg = read("fcis_R_101_voc_sds.yaml")
    assert cfg.SOLVER.BASE_LR == pytest.approx(expected["averaging_lr"])
    assert cfg.SOLVER.WEIGHT_DECAY == pytest.approx(expected["averaging_wd"])
    assert cfg.SOLVER.IMS_PER_BATCH == len(inputs["worker_grads"])
    model = TwoLayers(inputs["w0"]).double()
    optimizer = build_optimizer(cfg, model)
    gradient = sum(inputs["worker_grads"]) / len(inputs["worker_grads"])
    tripled = moved = inputs["w0"]
    momentum = 0.0
    for value in expected["reference"]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        assert model.roi_heads.cls_seg.weight.item() == pytest.approx(value, abs=1e-9)
        # conv_new at three times the rate, biases without decay
        momentum = 0.9 * momentum - 3 * 0.002 * (gradient + 1.25e-4 * tripled)
        tripled += momentum
        assert model.roi_heads.conv_new.weight.item() == pytest.approx(tripled, abs=1e-9)
    for step in range(3):
        moved -= 0.002 * gradient * (1 - 0.9 ** (step + 1)) / 0.1
    assert model.roi_heads.cls_seg.bias.item() == pytest.approx(moved, abs=1e-9)


def test_coco_rates_are_those_of_eight_summed_images():
    cfg = read("fcis_R_101_coco.yaml")
    assert cfg.SOLVER.IMS_PER_BATCH == 8
    assert cfg.SOLVER.BASE_LR == pytest.approx(8 * 5e-4)
    assert cfg.SOLVER.WEIGHT_DECAY == pytest.approx(5e-4 / 8)
    multiplier, n = build_lr_multiplier(cfg), cfg.SOLVER.MAX_ITER
    rates = [cfg.SOLVER.BASE_LR * multiplier(i / n) for i in (0, 249, 251, 155000, 157000, n - 1)]
    assert rates == pytest.approx([4e-4, 4e-4, 4e-3, 4e-3, 4e-4, 4e-4])


def test_voc_training_starts_at_the_full_rate_and_saves_epoch_21():
    cfg = read("fcis_R_101_voc_sds.yaml")
    multiplier, n = build_lr_multiplier(cfg), cfg.SOLVER.MAX_ITER
    assert [multiplier(i / n) for i in (0, 39360, 39362)] == pytest.approx([1, 1, 0.1])
    assert n == 22 * cfg.SOLVER.CHECKPOINT_PERIOD
    assert cfg.SOLVER.CHECKPOINT_KEEP >= 2 and 21 * cfg.SOLVER.CHECKPOINT_PERIOD - 1 == 59030


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("group", [1, 3])
def test_ablations_need_no_other_parameters(joint, group):
    cfg = make_config("FCIS.JOINT", joint, "FCIS.GROUP_SIZE", group)
    shapes = {k: p.shape for k, p in build_model(cfg).roi_heads.named_parameters()}
    assert shapes["cls_seg.weight"][0] == 2 * 4 * group**2
    assert shapes["bbox.weight"][0] == 4 * group**2
