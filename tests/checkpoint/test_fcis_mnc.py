"""The authors' checkpoints of FCIS (MXNet) and MNC (Caffe) at full size: their names and shapes,
written down here once more, against the models of the configs."""

import json
from pathlib import Path

import pytest
import torch

from d2ext.checkpoint import CheckpointFile, import_weights, list_importers
from d2ext.errors import UserError

from tests.checkpoint.helpers import Coded, first_column, meta_model

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "mnc_vectors.json"
FCIS, MNC = "projects/FCIS/configs/", "projects/MNC/configs/"
BLOCKS = {
    50: (list("abc"), list("abcd"), list("abcdef"), list("abc")),
    101: (list("abc"), ["a", "b1", "b2", "b3"], ["a"] + [f"b{i}" for i in range(1, 23)], "abc"),
    152: (
        list("abc"),
        ["a"] + [f"b{i}" for i in range(1, 8)],
        ["a"] + [f"b{i}" for i in range(1, 36)],
        "abc",
    ),
}
MXNET_NORM = {
    "weight": "arg:{}_gamma",
    "bias": "arg:{}_beta",
    "running_mean": "aux:{}_moving_mean",
    "running_var": "aux:{}_moving_var",
}


def caffe_convolutions(depth):
    """(name behind "res"/"bn", our layer, shape) of every convolution but the first."""
    inputs = 64
    for index, (mid, suffixes) in enumerate(zip((64, 128, 256, 512), BLOCKS[depth])):
        stage = index + 2
        for j, suffix in enumerate(suffixes):
            block, ours = f"{stage}{suffix}", f"res{stage}.{j}"
            if j == 0:
                yield f"{block}_branch1", f"{ours}.shortcut", (4 * mid, inputs, 1, 1)
            yield f"{block}_branch2a", f"{ours}.conv1", (mid, inputs, 1, 1)
            yield f"{block}_branch2b", f"{ours}.conv2", (mid, mid, 3, 3)
            yield f"{block}_branch2c", f"{ours}.conv3", (4 * mid, mid, 1, 1)
            inputs = 4 * mid


def mxnet_resnet(table, depth, prefix="backbone."):
    def add(conv, norm, ours, shape):
        table[f"arg:{conv}_weight"] = (f"{prefix}{ours}.weight", shape)
        for name, theirs in MXNET_NORM.items():
            table[theirs.format(norm)] = (f"{prefix}{ours}.norm.{name}", shape[:1])

    add("conv1", "bn_conv1", "stem.conv1", (64, 3, 7, 7))
    for name, ours, shape in caffe_convolutions(depth):
        add(f"res{name}", f"bn{name}", ours, shape)


def fcis(table, classes, anchors, depth=101):
    mxnet_resnet(table, depth)

    def add(theirs, ours, *shape):
        table[f"arg:{theirs}_weight"] = (f"{ours}.weight", shape)
        table[f"arg:{theirs}_bias"] = (f"{ours}.bias", shape[:1])

    rpn = "proposal_generator.rpn_head"
    add("rpn_conv_3x3", f"{rpn}.conv", 512, 1024, 3, 3)
    add("rpn_cls_score", f"{rpn}.objectness_logits", 2 * anchors, 512, 1, 1)
    add("rpn_bbox_pred", f"{rpn}.anchor_deltas", 4 * anchors, 512, 1, 1)
    add("conv_new_1", "roi_heads.conv_new", 1024, 2048, 1, 1)
    add("fcis_cls_seg", "roi_heads.cls_seg", 98 * (classes + 1), 1024, 1, 1)
    add("fcis_bbox", "roi_heads.bbox", 392, 1024, 1, 1)


def convert(table, coded, model, kind="mxnet"):
    for name, (_, shape) in table.items():
        coded.add(name, *shape)
    conversion = import_weights(CheckpointFile("x", kind, coded), model)
    conversion.check("x")
    state = model.state_dict()
    assert set(conversion.weights) == set(state)
    assert all(conversion.weights[k].shape == v.shape for k, v in state.items())
    return conversion


def check_renamed(table, coded, conversion, changed):
    """Everything but the changed layers arrives as it is."""
    for theirs, (ours, _) in table.items():
        if ours and not ours.startswith(tuple(changed)):
            found = conversion.weights[ours]
            assert found is coded[theirs] or found.data_ptr() == coded[theirs].data_ptr(), ours


def start(coded, name):
    """First value of a tensor: values of row r are this plus r."""
    return float(coded[name].flatten()[0]) if coded[name].dim() < 2 else float(coded[name][0, 0])


FCIS_MODELS = {
    "VOC": ("fcis_R_101_voc_sds.yaml", 20, 9, 101),
    "COCO": ("fcis_R_101_coco.yaml", 80, 12, 101),
    "COCO-R-50": ("fcis_R_50_coco.yaml", 80, 12, 50),
    "COCO-R-152": ("fcis_R_152_coco.yaml", 80, 12, 152),
}


@pytest.mark.parametrize("name", FCIS_MODELS)
def test_fcis_checkpoints_map_completely(name):
    coded = Coded()
    config, classes, anchors, depth = FCIS_MODELS[name]
    table = {}
    fcis(table, classes, anchors, depth)
    if depth == 101:
        assert sum(x.startswith("arg:") for x in table) == 324
        assert sum(x.startswith("aux:") for x in table) == 208
    model = meta_model(FCIS + config)
    conversion = convert(table, coded, model)
    assert conversion.title == "FCIS of MXNet" and conversion.having("unused") == []
    heads = ("roi_heads.cls_seg", "roi_heads.bbox", "proposal_generator.rpn_head.objectness")
    check_renamed(table, coded, conversion, heads)
    weights = conversion.weights
    for part in ("weight", "bias"):
        rows = first_column(weights[f"roi_heads.cls_seg.{part}"])
        first = start(coded, f"arg:fcis_cls_seg_{part}")
        # Class c of ours is class c + 1 of theirs, whose background is class 0; 98 rows each.
        expected = [98 * (c + 1) + i for c in range(classes) for i in range(98)] + list(range(98))
        assert (rows - first).tolist() == expected
        rows = first_column(weights[f"roi_heads.bbox.{part}"])
        first = start(coded, f"arg:fcis_bbox_{part}")
        assert (rows - first).tolist() == list(range(196, 392))
        logit = weights[f"proposal_generator.rpn_head.objectness_logits.{part}"]
        # Row A + a minus row a.
        assert (logit == anchors).all() and len(logit) == anchors
    importer = next(x for x in list_importers() if x.name == "mxnet-fcis")
    chosen, overrides = importer.config(CheckpointFile("x", "mxnet", coded))
    again = meta_model(FCIS + chosen, *overrides)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in again.state_dict().items()}


def test_fcis_settings_are_those_of_the_release():
    coded = Coded()
    table = {}
    fcis(table, 20, 9)
    table["arg:fcis_bbox_weight_test"] = table["arg:fcis_bbox_bias_test"] = (None, (392,))
    conversion = convert(table, coded, meta_model(FCIS + "fcis_R_101_voc_sds.yaml"))
    unused = {x.source: x.note for x in conversion.having("unused")}
    note = "fcis_bbox times the standard deviations"
    assert unused == {"fcis_bbox_weight_test": note, "fcis_bbox_bias_test": note}
    settings = conversion.settings
    assert settings["input_format"] == "RGB"
    assert settings["pixel_mean"] == [123.15, 115.9, 103.06]
    assert settings["pixel_std"] == [1, 1, 1]
    assert settings["roi_heads.box2box_transform.weights"] == [5, 5, 2, 2]
    assert settings["backbone.res3.0.conv1.stride"] == [2, 2]
    assert settings["backbone.res3.0.conv2.stride"] == [1, 1]
    assert not any(x.startswith("backbone.res5") for x in settings)
    assert conversion.notes == []


def test_a_missing_tensor_of_fcis_is_named_as_in_the_file():
    coded = Coded()
    table = {}
    fcis(table, 20, 9)
    del table["aux:bn4b22_branch2c_moving_var"]
    for name, (_, shape) in table.items():
        coded.add(name, *shape)
    model = meta_model(FCIS + "fcis_R_101_voc_sds.yaml")
    conversion = import_weights(CheckpointFile("x", "mxnet", coded), model)
    assert [x.target for x in conversion.having("missing")] == [
        "backbone.res4.22.conv3.norm.running_var"
    ]
    with pytest.raises(UserError, match="1 tensors of the model are not in it"):
        conversion.check("x")


def test_the_voc_model_of_fcis_does_not_fit_the_one_for_coco():
    coded = Coded()
    table = {}
    fcis(table, 20, 9)
    for name, (_, shape) in table.items():
        coded.add(name, *shape)
    model = meta_model(FCIS + "fcis_R_101_coco.yaml")
    conversion = import_weights(CheckpointFile("x", "mxnet", coded), model)
    # Not for fine-tuning either: the anchors are others.
    with pytest.raises(UserError, match=r"\(9, 512, 1, 1\) in the file, \(12, 512, 1, 1\)"):
        conversion.check("x", other_classes=True)


VGG = {
    "conv1_1": (64, 3),
    "conv1_2": (64, 64),
    "conv2_1": (128, 64),
    "conv2_2": (128, 128),
    "conv3_1": (256, 128),
    "conv3_2": (256, 256),
    "conv3_3": (256, 256),
    "conv4_1": (512, 256),
    "conv4_2": (512, 512),
    "conv4_3": (512, 512),
    "conv5_1": (512, 512),
    "conv5_2": (512, 512),
    "conv5_3": (512, 512),
}
MNC_LAYERS = {
    "rpn_conv_3x3": ("proposal_generator.rpn_head.conv", (512, 512, 3, 3)),
    "rpn_cls_score": ("proposal_generator.rpn_head.objectness_logits", (18, 512, 1, 1)),
    "rpn_bbox_pred": ("proposal_generator.rpn_head.anchor_deltas", (36, 512, 1, 1)),
    "fc6_maskest": ("roi_heads.mask_head.fc1", (256, 100352)),
    "mask_pred": ("roi_heads.mask_head.fc2", (441, 256)),
    "fc6": ("roi_heads.category_head.box_fc6", (4096, 25088)),
    "fc7": ("roi_heads.category_head.box_fc7", (4096, 4096)),
    "fc6_mask": ("roi_heads.category_head.mask_fc6", (4096, 25088)),
    "fc7_mask": ("roi_heads.category_head.mask_fc7", (4096, 4096)),
    "cls_score": ("roi_heads.category_head.cls_score", (21, 8192)),
    "seg_cls_score": ("roi_heads.category_head.seg_cls_score", (21, 8192)),
    "bbox_pred": ("roi_heads.category_head.bbox_pred", (84, 8192)),
}


def mnc(table, form):
    layers = {k: (f"backbone.{k}", (*v, 3, 3)) for k, v in VGG.items()}
    layers.update(MNC_LAYERS)
    for name, (ours, shape) in layers.items():
        table[form.format(name, 0)] = (f"{ours}.weight", shape)
        table[form.format(name, 1)] = (f"{ours}.bias", shape[:1])


@pytest.mark.parametrize("form", ["data/{}/{}", "{}.{}"], ids=["hdf5", "protobuf"])
def test_the_mnc_checkpoint_maps_completely(form):
    coded = Coded()
    table = {}
    mnc(table, form)
    elements = sum(torch.Size(shape).numel() for _, shape in table.values())
    assert elements == 283_029_933
    model = meta_model(MNC + "mnc_vgg16_voc_sds.yaml")
    conversion = convert(table, coded, model, "hdf5")
    assert conversion.title == "MNC of Caffe" and conversion.having("unused") == []
    category = "roi_heads.category_head."
    changed = [f"{category}{x}" for x in ("cls_score", "seg_cls_score", "bbox_pred")]
    changed.append("proposal_generator.rpn_head.objectness")
    check_renamed(table, coded, conversion, changed)
    vector = next(
        v for v in json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"] if v["id"] == "IM1"
    )["expected"]
    for part, blob in (("weight", 0), ("bias", 1)):
        for name in ("cls_score", "seg_cls_score"):
            rows = first_column(conversion.weights[f"{category}{name}.{part}"])
            rows -= start(coded, form.format(name, blob))
            assert rows.tolist() == vector["cls_row_for_d2_row"]
        raw = first_column(conversion.weights[f"{category}bbox_pred.{part}"])
        first = start(coded, form.format("bbox_pred", blob))
        # The release stores deltas times their standard deviations, ours are without them.
        rows = raw / torch.tensor([10.0, 10.0, 5.0, 5.0]).double().repeat(20) - first
        wanted = torch.arange(vector["first_bbox_row_for_d2_class0"], 84).double()
        assert len(rows) == vector["bbox_rows_used"]
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-6)
        logit = conversion.weights[f"proposal_generator.rpn_head.objectness_logits.{part}"]
        assert (logit == 9).all() and len(logit) == 9
    importer = next(x for x in list_importers() if x.name == "caffe-mnc")
    file = CheckpointFile("x", "hdf5", coded)
    assert importer.config(file) == ("mnc_vgg16_voc_sds.yaml", [])


def test_mnc_settings_are_those_of_the_release():
    coded = Coded()
    table = {}
    mnc(table, "{}.{}")
    table["fc6_ext.0"] = (None, (4096, 25088))
    table["rpn_conv/3x3.0"] = table.pop("rpn_conv_3x3.0")  # as Faster R-CNN calls it
    table["rpn_conv/3x3.1"] = table.pop("rpn_conv_3x3.1")
    conversion = convert(table, coded, meta_model(MNC + "mnc_vgg16_voc_sds.yaml"))
    assert [x.source for x in conversion.having("unused")] == ["fc6_ext.0"]
    assert conversion.unexplained() == []
    assert conversion.settings == {
        "input_format": "BGR",
        "pixel_mean": [102.9801, 115.9465, 122.7717],
        "pixel_std": [1, 1, 1],
        "roi_heads.box_transform.plus_one": True,
        "proposal_generator.box2box_transform.plus_one": True,
        "voting.legacy_plus_one": True,
    }


@pytest.mark.parametrize("duplicated", [True, False])
def test_image_net_weights_start_mnc(duplicated):
    """With fc6 and fc7 copied for the mask path, as the authors' file has them, or without."""
    coded = Coded()
    for name, shape in VGG.items():
        coded.add(f"{name}.0", *shape, 3, 3)
        coded.add(f"{name}.1", shape[0])
    for name, shape in {"fc6": (4096, 25088), "fc7": (4096, 4096), "fc8": (1000, 4096)}.items():
        for copy in ("", "_mask") if duplicated and name != "fc8" else ("",):
            coded.add(f"{name}{copy}.0", *shape)
            coded.add(f"{name}{copy}.1", shape[0])
    model = meta_model(MNC + "mnc_vgg16_voc_sds.yaml")
    conversion = import_weights(CheckpointFile("x", "caffemodel", coded), model, "mnc")
    conversion.check("x")
    assert len(conversion.weights) == 34 and len(conversion.having("kept")) == 16
    head = "roi_heads.category_head."
    source = "fc6_mask.0" if duplicated else "fc6.0"
    assert conversion.weights[f"{head}mask_fc6.weight"] is coded[source]
    assert conversion.weights[f"{head}box_fc6.weight"] is coded["fc6.0"]
    assert {x.source for x in conversion.having("unused")} == {"fc8.0", "fc8.1"}
    assert conversion.settings == {"input_format": "BGR", "pixel_std": [1, 1, 1]}


def test_torchvision_weights_start_mnc():
    coded = Coded()
    import torchvision

    with torch.device("meta"):
        source = torchvision.models.vgg16().state_dict()
    for name, value in source.items():
        coded.add(name, *value.shape)
    model = meta_model(MNC + "mnc_vgg16_voc_sds.yaml")
    conversion = import_weights(CheckpointFile("x", "torch", coded), model)
    conversion.check("x")
    assert conversion.title == "VGG-16 of torchvision" and len(conversion.weights) == 34
    assert conversion.weights["backbone.conv5_3.bias"] is coded["features.28.bias"]
    head = "roi_heads.category_head."
    for path in ("box", "mask"):
        assert conversion.weights[f"{head}{path}_fc7.weight"] is coded["classifier.3.weight"]
    assert conversion.settings["input_format"] == "RGB"
