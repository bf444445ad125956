"""MMDetection's checkpoints at full size: names and shapes of its published detectors, written down
here once more, against the models of the configs."""

import pytest
import torch

from d2ext.checkpoint import CheckpointFile, export_weights, import_weights, list_importers
from d2ext.errors import UserError

from tests.checkpoint.helpers import Coded, meta_model

HTC = "projects/HTC/configs/"
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def pair(table, theirs, ours, *shape, bias=True):
    table[f"{theirs}.weight"] = (f"{ours}.weight", shape)
    if bias:
        table[f"{theirs}.bias"] = (f"{ours}.bias", shape[:1])


def norm(table, theirs, ours, channels):
    for name in NORM:
        table[f"{theirs}.{name}"] = (f"{ours}.{name}", (channels,))
    table[f"{theirs}.num_batches_tracked"] = (None, ())


def backbone(table, depth=50, groups=1, width=64, deform=False):
    pair(table, "backbone.conv1", "backbone.bottom_up.stem.conv1", 64, 3, 7, 7, bias=False)
    norm(table, "backbone.bn1", "backbone.bottom_up.stem.conv1.norm", 64)
    inputs = 64
    for layer, blocks in enumerate(BLOCKS[depth]):
        mid, out = groups * width * 2**layer, 256 * 2**layer
        for j in range(blocks):
            a = f"backbone.layer{layer + 1}.{j}"
            b = f"backbone.bottom_up.res{layer + 2}.{j}"
            shapes = [(mid, inputs, 1, 1), (mid, mid // groups, 3, 3), (out, mid, 1, 1)]
            for i, shape in enumerate(shapes, start=1):
                pair(table, f"{a}.conv{i}", f"{b}.conv{i}", *shape, bias=False)
                norm(table, f"{a}.bn{i}", f"{b}.conv{i}.norm", shape[0])
            if deform and layer:
                pair(table, f"{a}.conv2.conv_offset", f"{b}.conv2_offset", 18, mid, 3, 3)
            if j == 0:
                pair(table, f"{a}.downsample.0", f"{b}.shortcut", out, inputs, 1, 1, bias=False)
                norm(table, f"{a}.downsample.1", f"{b}.shortcut.norm", out)
            inputs = out


def pyramid_and_rpn(table):
    for n, channels in enumerate((256, 512, 1024, 2048)):
        lateral, output = f"backbone.fpn_lateral{n + 2}", f"backbone.fpn_output{n + 2}"
        pair(table, f"neck.lateral_convs.{n}.conv", lateral, 256, channels, 1, 1)
        pair(table, f"neck.fpn_convs.{n}.conv", output, 256, 256, 3, 3)
    ours = "proposal_generator.rpn_head"
    pair(table, "rpn_head.rpn_conv", f"{ours}.conv", 256, 256, 3, 3)
    pair(table, "rpn_head.rpn_cls", f"{ours}.objectness_logits", 3, 256, 1, 1)
    pair(table, "rpn_head.rpn_reg", f"{ours}.anchor_deltas", 12, 256, 1, 1)


def box_head(table, theirs, ours, deltas=4):
    """`ours` holds the place of the stage: "roi_heads.{}.0"."""
    head, predictor = ours.format("box_head"), ours.format("box_predictor")
    pair(table, f"{theirs}.shared_fcs.0", f"{head}.fc1", 1024, 12544)
    pair(table, f"{theirs}.shared_fcs.1", f"{head}.fc2", 1024, 1024)
    pair(table, f"{theirs}.fc_cls", f"{predictor}.cls_score", 81, 1024)
    pair(table, f"{theirs}.fc_reg", f"{predictor}.bbox_pred", deltas, 1024)


def mask_head(table, theirs, ours):
    for n in range(4):
        pair(table, f"{theirs}.convs.{n}.conv", f"{ours}.mask_fcn{n + 1}", 256, 256, 3, 3)
    table[f"{theirs}.upsample.weight"] = (f"{ours}.deconv.weight", (256, 256, 2, 2))
    table[f"{theirs}.upsample.bias"] = (f"{ours}.deconv.bias", (256,))
    pair(table, f"{theirs}.conv_logits", f"{ours}.predictor", 80, 256, 1, 1)


def cascade(table, flow=False):
    for t in range(3):
        box_head(table, f"roi_head.bbox_head.{t}", f"roi_heads.{{}}.{t}")
        theirs, ours = f"roi_head.mask_head.{t}", f"roi_heads.mask_head.{t}"
        mask_head(table, theirs, ours)
        if flow and t:
            pair(table, f"{theirs}.conv_res.conv", f"{ours}.conv_res", 256, 256, 1, 1)


def semantic(table):
    theirs, ours = "roi_head.semantic_head", "roi_heads.semantic_head"
    for n in range(5):
        name = f"lateral_convs.{n}"
        pair(table, f"{theirs}.{name}.conv", f"{ours}.{name}", 256, 256, 1, 1)
    for n in range(4):
        pair(table, f"{theirs}.convs.{n}.conv", f"{ours}.convs.{n}", 256, 256, 3, 3)
    pair(table, f"{theirs}.conv_embedding.conv", f"{ours}.conv_embedding", 256, 256, 1, 1)
    pair(table, f"{theirs}.conv_logits", f"{ours}.conv_logits", 183, 256, 1, 1)


def htc(with_semantic=True, **options):
    table = {}
    backbone(table, **options)
    pyramid_and_rpn(table)
    cascade(table, flow=True)
    if with_semantic:
        semantic(table)
    return table


def check(table, coded, model, rest=None):
    """Import a file of these names; every tensor must arrive as it is under its own name."""
    for name, (_, shape) in table.items():
        coded.add(name, *shape)
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded, rest or {}), model)
    conversion.check("x.pth")
    expected = {ours: theirs for theirs, (ours, _) in table.items() if ours}
    assert set(conversion.weights) == set(expected)
    state = model.state_dict()
    assert set(expected) == set(state)
    for ours, theirs in expected.items():
        assert conversion.weights[ours].shape == state[ours].shape
        assert conversion.weights[ours] is coded[theirs], ours
    unused = {x.source: x.note for x in conversion.having("unused")}
    assert unused == {x: "a counter" for x, (ours, _) in table.items() if ours is None}
    assert len(conversion.having("used")) == len(expected)
    return conversion


VARIANTS = {
    "R-50": ("htc_R_50_FPN_1x_coco.yaml", (), {}),
    "R-101": ("htc_R_101_FPN_20e_coco.yaml", (), {"depth": 101}),
    "X-101-32x4d": (
        "htc_R_101_FPN_20e_coco.yaml",
        ("MODEL.RESNETS.NUM_GROUPS=32", "MODEL.RESNETS.WIDTH_PER_GROUP=4"),
        {"depth": 101, "groups": 32, "width": 4},
    ),
    "X-101-64x4d": (
        "htc_R_101_FPN_20e_coco.yaml",
        ("MODEL.RESNETS.NUM_GROUPS=64", "MODEL.RESNETS.WIDTH_PER_GROUP=4"),
        {"depth": 101, "groups": 64, "width": 4},
    ),
    "X-101-64x4d-DCN": (
        "htc_X_101_64x4d_FPN_dcn_ms_20e_coco.yaml",
        (),
        {"depth": 101, "groups": 64, "width": 4, "deform": True},
    ),
}


def htc_importer():
    return next(x for x in list_importers("htc") if x.name == "mmdet-htc")


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_htc_variants_map_one_to_one_and_back(variant):
    coded = Coded()
    config, overrides, options = VARIANTS[variant]
    table, model = htc(**options), meta_model(HTC + config, *overrides)
    conversion = check(table, coded, model)
    assert conversion.title == "MMDetection HTC" and conversion.notes == []
    back = export_weights(conversion.weights, htc_importer().rules(model))
    assert set(back) == {theirs for theirs, (ours, _) in table.items() if ours}
    assert all(back[name] is coded[name] for name in back)
    # The config that the converter would have chosen is this one.
    file = CheckpointFile("x.pth", "torch", coded, {})
    name, more = htc_importer().config(file)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    chosen = meta_model(HTC + name, *more)
    assert shapes == {k: v.shape for k, v in chosen.state_dict().items()}


def test_htc_r50_has_373_tensors_and_53_counters():
    coded = Coded()
    table = htc()
    assert len(table) == 426
    assert sum(ours is None for ours, _ in table.values()) == 53
    assert len(check(table, coded, meta_model(HTC + "htc_R_50_FPN_1x_coco.yaml")).weights) == 373


def test_lazy_models_take_the_same_files():
    coded = Coded()
    check(htc(), coded, meta_model(HTC + "htc_R_50_FPN_1x_coco.py"))


def test_offsets_under_the_name_of_early_versions_are_found():
    coded = Coded()
    table = htc(depth=101, groups=64, width=4, deform=True)
    early = {k.replace(".conv2.conv_offset.", ".conv2_offset."): v for k, v in table.items()}
    assert early != table
    check(early, coded, meta_model(HTC + "htc_X_101_64x4d_FPN_dcn_ms_20e_coco.yaml"))


def test_the_model_without_semantic_branch_loads_its_own_checkpoints_only():
    coded = Coded()
    config = HTC + "htc_without_semantic_R_50_FPN_1x_coco.yaml"
    check(htc(with_semantic=False), coded, meta_model(config))
    file = CheckpointFile("x.pth", "torch", coded, {})
    assert htc_importer().config(file)[0] == "htc_without_semantic_R_50_FPN_1x_coco.yaml"
    extra = dict(coded, **{"roi_head.semantic_head.conv_logits.bias": torch.zeros(183)})
    conversion = import_weights(CheckpointFile("x.pth", "torch", extra, {}), meta_model(config))
    with pytest.raises(UserError, match="1 tensors in it have no place .*conv_logits.bias"):
        conversion.check("x.pth")
    conversion.check("x.pth", partial=True)


def test_cascade_mask_rcnn_maps_to_the_cascade_of_htc():
    coded = Coded()
    table = {}
    backbone(table)
    pyramid_and_rpn(table)
    cascade(table)
    model = meta_model(HTC + "htc_ablation_cascade_R_50_FPN_20e_coco.yaml")
    conversion = check(table, coded, model)
    assert conversion.settings["roi_heads.mask_ensemble"] == "mean"
    name, overrides = htc_importer().config(CheckpointFile("x.pth", "torch", coded, {}))
    assert name == "htc_ablation_cascade_R_50_FPN_20e_coco.yaml"


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_cascade_mask_rcnn_maps_to_detectron2s_with_the_last_mask_head(kind):
    coded = Coded()
    table = {}
    backbone(table)
    pyramid_and_rpn(table)
    cascade(table)
    for name, (_, shape) in table.items():
        coded.add(name, *shape)
    model = meta_model(f"configs/cascade_mask_rcnn_R_50_FPN_1x_coco.{kind}")
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded, {}), model)
    conversion.check("x.pth")
    assert set(conversion.weights) == set(model.state_dict())
    taken = conversion.weights["roi_heads.mask_head.mask_fcn2.weight"]
    assert taken is coded["roi_head.mask_head.2.convs.1.conv.weight"]
    unused = [x.source for x in conversion.having("unused") if "num_batches" not in x.source]
    assert len(unused) == 24 and all(x.startswith("roi_head.mask_head.") for x in unused)
    assert any("averages three mask heads" in line for line in conversion.notes)
    path = "roi_heads.box_predictor.2.box2box_transform.weights"
    assert conversion.settings[path] == [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067]


def test_mask_rcnn_maps_to_detectron2s():
    coded = Coded()
    table = {}
    backbone(table)
    pyramid_and_rpn(table)
    box_head(table, "roi_head.bbox_head", "roi_heads.{}", deltas=320)
    mask_head(table, "roi_head.mask_head", "roi_heads.mask_head")
    conversion = check(table, coded, meta_model("configs/mask_rcnn_R_50_FPN_1x_coco.yaml"))
    path = "roi_heads.box_predictor.box2box_transform.weights"
    assert conversion.settings[path] == [10, 10, 5, 5]


def test_pixels_and_strides_come_from_the_config_in_the_file():
    coded = Coded()
    model = meta_model("configs/mask_rcnn_R_50_FPN_1x_coco.yaml")
    table = {}
    backbone(table)
    pyramid_and_rpn(table)
    box_head(table, "roi_head.bbox_head", "roi_heads.{}", deltas=320)
    mask_head(table, "roi_head.mask_head", "roi_heads.mask_head")
    old = """model = dict(backbone=dict(type='ResNet', depth=50, style='caffe'))
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"""
    new = """data_preprocessor=dict(
        bgr_to_rgb=True, mean=[
            1.0,
            2.0,
            3.5,
        ], std=[4, 5, 6])"""
    settings = check(table, coded, model, {"meta": {"config": old}}).settings
    assert settings["input_format"] == "BGR"
    assert settings["pixel_mean"] == [103.53, 116.28, 123.675]
    assert settings["pixel_std"] == [1, 1, 1]
    assert settings["backbone.bottom_up.res3.0.conv1.stride"] == [2, 2]
    assert settings["backbone.bottom_up.res3.0.conv2.stride"] == [1, 1]
    file = CheckpointFile("x.pth", "torch", coded, {"meta": {"cfg": new}})
    settings = import_weights(file, model).settings
    assert settings["input_format"] == "RGB"
    assert (settings["pixel_mean"], settings["pixel_std"]) == ([1, 2, 3.5], [4, 5, 6])
    assert settings["backbone.bottom_up.res3.0.conv1.stride"] == [1, 1]
    settings = import_weights(CheckpointFile("x.pth", "torch", coded, {"meta": 3}), model).settings
    assert settings["pixel_mean"] == [123.675, 116.28, 103.53]


def test_checkpoints_of_version_1_are_refused():
    coded = Coded()
    for name in ("backbone.conv1.weight", "rpn_head.rpn_conv.weight", "bbox_head.0.fc_cls.weight"):
        coded.add(name, 4)
    model = meta_model(HTC + "htc_R_50_FPN_1x_coco.yaml")
    with pytest.raises(UserError, match="it is of MMDetection 1.x"):
        import_weights(CheckpointFile("x.pth", "torch", coded, {}), model)


def test_another_number_of_classes_is_a_conflict_unless_it_is_a_start():
    coded = Coded()
    for name, (_, shape) in htc().items():
        coded.add(name, *shape)
    model = meta_model(HTC + "htc_R_50_FPN_1x_coco.yaml", "MODEL.ROI_HEADS.NUM_CLASSES=3")
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded, {}), model)
    with pytest.raises(
        UserError, match=r"12 tensors have another shape .*\(81, 1024\) in the file"
    ):
        conversion.check("x.pth")
    with pytest.raises(UserError):
        conversion.check("x.pth", partial=True)
    conversion.check("x.pth", other_classes=True)
    assert len(conversion.weights) == 373 - 12


def test_a_shape_conflict_elsewhere_is_refused_always():
    coded = Coded()
    for name, (_, shape) in htc().items():
        coded.add(name, *((512, *shape[1:]) if name == "neck.fpn_convs.0.conv.weight" else shape))
    model = meta_model(HTC + "htc_R_50_FPN_1x_coco.yaml")
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded, {}), model)
    for options in ({}, {"partial": True}, {"other_classes": True}):
        with pytest.raises(UserError, match=r"'neck.fpn_convs.0.conv.weight' \(\(512, 256, 3, 3\)"):
            conversion.check("x.pth", **options)


def test_a_checkpoint_of_another_depth_is_refused():
    coded = Coded()
    for name, (_, shape) in htc().items():
        coded.add(name, *shape)
    model = meta_model(HTC + "htc_R_101_FPN_20e_coco.yaml")
    conversion = import_weights(CheckpointFile("x.pth", "torch", coded, {}), model)
    with pytest.raises(UserError, match="255 tensors of the model are not in it"):
        conversion.check("x.pth")
