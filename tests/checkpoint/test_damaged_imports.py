"""Files that were read, but whose tensors are not what the importers expect: refused in one line,
or converted into exactly what the model asks for."""

import random

import pytest
import torch

from d2ext.checkpoint import Checkpointer, CheckpointFile, import_weights
from d2ext.errors import UserError
from d2ext.utils.testing import tiny_config

from detectron2.modeling import build_model

from tests.checkpoint.helpers import meta_model

COUNT = 40
FILES = {
    "mmdet-htc": ("projects/HTC/configs/htc_R_50_FPN_1x_coco.yaml", "torch"),
    "fcis": ("projects/FCIS/configs/fcis_R_50_coco.yaml", "mxnet"),
    "mnc": ("projects/MNC/configs/mnc_vgg16_voc_sds.yaml", "caffemodel"),
    "mask-rcnn": ("configs/mask_rcnn_R_50_FPN_1x_coco.yaml", "torch"),
    "caffe-resnet": ("projects/FCIS/configs/fcis_R_50_coco.yaml", "caffemodel"),
}
FIRST_NAMES = {
    "mmdet-htc": {
        "backbone.conv1.weight": (64, 3, 7, 7),
        "rpn_head.rpn_conv.weight": (256, 256, 3, 3),
        "roi_head.bbox_head.0.fc_cls.weight": (81, 1024),
        "roi_head.semantic_head.conv_logits.bias": (183,),
    },
    "fcis": {
        "arg:conv1_weight": (64, 3, 7, 7),
        "arg:rpn_cls_score_weight": (24, 512, 1, 1),
        "arg:fcis_bbox_bias": (392,),
        "arg:fcis_cls_seg_bias": (98 * 81,),
        "aux:bn_conv1_moving_var": (64,),
    },
    "mnc": {
        "conv1_1.0": (64, 3, 3, 3),
        "rpn_cls_score.1": (18,),
        "bbox_pred.0": (84, 8192),
        "bbox_pred.1": (84,),
        "seg_cls_score.1": (21,),
    },
    "mask-rcnn": {
        "backbone.bn1.running_var": (64,),
        "roi_head.bbox_head.fc_reg.weight": (320, 1024),
        "roi_head.mask_head.convs.0.conv.bias": (256,),
    },
    "caffe-resnet": {
        "conv1.0": (64, 3, 7, 7),
        "conv1.1": (64,),
        "bn_conv1.0": (64,),
        "bn_conv1.1": (64,),
        "bn_conv1.2": (1,),
        "scale_conv1.0": (64,),
    },
}
SHAPES = [(), (0,), (1,), (3,), (64,), (5, 1), (0, 4), (64, 3, 7), (1, 1, 1, 84), (7, 7, 3, 64)]
DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64]


def mutated(shapes, rng):
    weights = {k: torch.zeros(1).expand(v) for k, v in shapes.items()}
    for _ in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice(list(weights))
        kind = rng.randrange(4)
        if kind == 0:
            weights[name] = torch.zeros(rng.choice(SHAPES))
        elif kind == 1:
            weights[name] = torch.zeros(1, dtype=rng.choice(DTYPES)).expand(weights[name].shape)
        elif kind == 2:
            position = rng.randrange(len(name))
            weights[name[:position] + rng.choice("0x./") + name[position + 1 :]] = weights.pop(name)
        else:
            weights[name + rng.choice(["", ".0", "_ext.0", ".num_batches_tracked"])] = torch.zeros(
                3
            )
    return weights


@pytest.mark.parametrize("kind", FILES)
def test_changed_tensors_are_refused_or_converted_into_what_fits(kind):
    config, file_format = FILES[kind]
    model, rng = meta_model(config), random.Random(kind)
    state = model.state_dict()
    outcomes = {True: 0, False: 0}
    for _ in range(COUNT):
        file = CheckpointFile("some file", file_format, mutated(FIRST_NAMES[kind], rng))
        try:
            conversion = import_weights(file, model)
            conversion.check(file.path, partial=True)
            outcomes[True] += 1
            for name, value in conversion.weights.items():
                assert value.shape == state[name].shape
            assert conversion.table().count("\n") >= len(state)
        except UserError as error:
            outcomes[False] += 1
            assert "\n" not in str(error) and len(str(error)) < 500
    assert min(outcomes.values()) > 2, outcomes


def test_impossible_settings_in_a_checkpoint_of_ours_are_named(tmp_path):
    cfg = tiny_config()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    model = build_model(cfg)
    metadata = {"settings": {"roi_heads.absent": 1}}
    torch.save({"model": model.state_dict(), "metadata": metadata}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="needs roi_heads.absent = 1, which this model cannot have"):
        Checkpointer(build_model(cfg)).load(str(tmp_path / "x.pth"))
    for metadata in (3, {"settings": 3}, {"settings": None}, None):
        torch.save({"model": model.state_dict(), "metadata": metadata}, tmp_path / "x.pth")
        Checkpointer(build_model(cfg)).load(str(tmp_path / "x.pth"))
