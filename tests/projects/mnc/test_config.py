import inspect
import re
from pathlib import Path

import pytest
import torch

from d2ext.config import get_config
from d2ext.projects.mnc import InstanceVoting, MNCROIHeads, add_mnc_config, build_pooler
from d2ext.projects.mnc import config as mnc_config

from detectron2.config import get_cfg, instantiate

CONFIGS = Path(__file__).resolve().parents[3] / "projects" / "MNC" / "configs"


@pytest.fixture
def own():
    cfg = get_cfg()
    add_mnc_config(cfg)
    return cfg.MODEL.MNC


def test_there_are_at_most_forty_keys_and_each_has_a_comment():
    lines = [x.strip() for x in inspect.getsource(mnc_config).splitlines()]
    keys = [i for i, x in enumerate(lines) if re.match(r"mnc\.[A-Z_]+ = ", x)]
    assert 10 < len(keys) <= 40
    for i in keys:
        assert lines[i - 1].startswith("#") or i - 1 in keys, lines[i]


def test_defaults_are_those_of_the_release_with_its_errors_mended(own):
    assert (own.NUM_STAGES, own.NUM_STAGES_TEST) == (5, 5)
    assert (own.MASK_SIZE, own.WARP_SIZE, own.POOL_SIZE) == (21, 28, 14)
    assert own.WARP_QUANTIZE and own.WARP_BIN_REDUCE == "point"
    assert own.BRIDGE_DENORMALIZE_IN_TRAIN and own.RPN_RELABEL_FROM_ROIS
    assert (own.BRIDGE_FG_ONLY_TRAIN, own.BRIDGE_FG_ONLY_TEST) == (True, False)
    assert own.BOX_GRAD_CLIP == 1 / 512 and own.BOX_GRADIENT
    assert (own.MASK_LOSS_WEIGHT, own.BIN_THRESH) == (2.0, 0.4)


def test_keys_of_detectron2_stay_as_they_are():
    plain, ours = get_cfg(), get_cfg()
    add_mnc_config(ours)
    del ours.MODEL["MNC"]
    assert ours == plain


@pytest.mark.parametrize(
    "built, arguments",
    [
        (
            MNCROIHeads,
            {
                "num_stages": "NUM_STAGES",
                "num_stages_test": "NUM_STAGES_TEST",
                "mask_loss_weight": "MASK_LOSS_WEIGHT",
                "mask_threshold": "BIN_THRESH",
                "box_gradient": "BOX_GRADIENT",
                "gate_gradient": "GATE_GRADIENT",
                "box_gradient_limit": "BOX_GRAD_CLIP",
                "bridge_denormalize": "BRIDGE_DENORMALIZE_IN_TRAIN",
            },
        ),
        (
            InstanceVoting,
            {
                "voting": "VOTING",
                "mode": "VOTING_MODE",
                "masks": "OUTPUT_MASKS",
                "mask_threshold": "BIN_THRESH",
                "legacy_plus_one": "LEGACY_PLUS_ONE",
            },
        ),
        (
            build_pooler,
            {
                "quantize": "WARP_QUANTIZE",
                "aligned": "WARP_ALIGNED",
                "border": "WARP_BORDER",
                "bin_reduce": "WARP_BIN_REDUCE",
            },
        ),
    ],
)
def test_lazy_defaults_equal_the_yaml_defaults(own, built, arguments):
    function = built.__init__ if isinstance(built, type) else built
    parameters = inspect.signature(function).parameters

    def plain(value):
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    for argument, key in arguments.items():
        assert plain(parameters[argument].default) == plain(own[key]), key


@pytest.fixture
def vgg_network():
    """The network of the released models, without memory for its weights."""
    model = get_config(str(CONFIGS / "mnc_vgg16_voc_sds.py")).model
    with torch.device("meta"):
        return instantiate(model)


def test_parameters_of_the_vgg_network_are_those_of_the_release(vgg_network):
    shapes = {name: tuple(p.shape) for name, p in vgg_network.named_parameters()}
    category, mask = "roi_heads.category_head", "roi_heads.mask_head"
    rpn = "proposal_generator.rpn_head"
    expected = {f"{rpn}.conv": (512, 512, 3, 3), f"{rpn}.objectness_logits": (9, 512, 1, 1)}
    expected[f"{rpn}.anchor_deltas"] = (36, 512, 1, 1)
    expected.update({f"{mask}.fc1": (256, 100352), f"{mask}.fc2": (441, 256)})
    for path in ("box", "mask"):
        expected[f"{category}.{path}_fc6"] = (4096, 25088)
        expected[f"{category}.{path}_fc7"] = (4096, 4096)
    expected[f"{category}.cls_score"] = expected[f"{category}.seg_cls_score"] = (21, 8192)
    expected[f"{category}.bbox_pred"] = (80, 8192)
    channels = 3
    for block, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for index in range(1, count + 1):
            expected[f"backbone.conv{block}_{index}"] = (width, channels, 3, 3)
            channels = width
    weights = {f"{name}.weight": shape for name, shape in expected.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in expected.items()}
    assert shapes == {**weights, **biases}
    # The release has two logits for each of 9 anchors and box deltas for the background.
    dropped = 9 * (512 + 1) + 4 * (8192 + 1)
    assert sum(p.numel() for p in vgg_network.parameters()) == 283_029_933 - dropped


def test_regions_of_the_vgg_network_have_the_released_shapes(vgg_network):
    heads = vgg_network.roi_heads
    x = torch.zeros(3, 512, 14, 14, device="meta")
    masks = heads.mask_head(x)
    assert masks.shape == (3, 1, 21, 21)
    assert heads.pooler.output_size == (14, 14) and heads.pooler.operator.max_pool
    box = heads.category_head.box_fc6
    assert box.in_features == 512 * 7 * 7


def test_resnet_101_network_has_one_fifth_stage_per_path():
    model = get_config(str(CONFIGS / "mnc_R_101_C4_coco.py")).model
    with torch.device("meta"):
        network = instantiate(model)
    head = network.roi_heads.category_head
    assert not [n for n, _ in network.backbone.named_parameters() if n.startswith("res5")]
    assert len(network.backbone.res4) == 23
    x = torch.zeros(2, 1024, 14, 14, device="meta")
    mask, box = head.paths(x, x)
    assert mask.shape == box.shape == (2, 2048)
    assert head.bbox_pred.weight.shape == (320, 4096)
    assert network.roi_heads.mask_head.fc1.in_features == 1024 * 14 * 14
