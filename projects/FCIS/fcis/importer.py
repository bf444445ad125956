"""The authors' MXNet checkpoints (`.params`) for this project's models."""

from typing import Any

from torch import Tensor, nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.importers.common import (
    anchor_notes,
    one_logit,
    pixel_settings,
    stride_settings,
)
from d2ext.checkpoint.importers.resnet import caffe_stem, mxnet_resnet_rules, strip_prefixes
from d2ext.checkpoint.mapping import Rule
from d2ext.checkpoint.registry import Importer, register_importer
from d2ext.projects.fcis.roi_heads import FCISROIHeads


def foreground_deltas(x: Tensor) -> Tensor:
    """Box maps of "background" and "foreground" -> the latter; the former are never trained."""
    return x.chunk(2)[1]


def background_maps_last(parts: int):
    """Score maps of the background first -> last.

    Args:
        parts: k * k; each class has two maps of so many channels.
    """
    return lambda x: x.roll(-2 * parts, dims=0)


def fcis_rules(model: nn.Module) -> list[Rule]:
    """Names of ResNet, RPN and the three convolutions of the heads."""
    rpn, heads = "proposal_generator.rpn_head.", "roi_heads."
    if not isinstance(getattr(model, "roi_heads", None), FCISROIHeads):
        return []
    last = background_maps_last(model.roi_heads.group_size**2)
    return [
        *mxnet_resnet_rules("backbone."),
        Rule(f"{rpn}conv.{{p:w}}", "rpn_conv_3x3_{p}"),
        Rule(
            f"{rpn}objectness_logits.{{p:w}}",
            "rpn_cls_score_{p}",
            one_logit,
            label="foreground minus background",
        ),
        Rule(f"{rpn}anchor_deltas.{{p:w}}", "rpn_bbox_pred_{p}"),
        Rule(f"{heads}conv_new.{{p:w}}", "conv_new_1_{p}"),
        Rule(f"{heads}cls_seg.{{p:w}}", "fcis_cls_seg_{p}", last, True, "background last"),
        Rule(f"{heads}bbox.{{p:w}}", "fcis_bbox_{p}", foreground_deltas, label="foreground half"),
    ]


def _settings(file: CheckpointFile, model: nn.Module) -> dict[str, Any]:
    return {
        **pixel_settings(model, "RGB", (123.15, 115.9, 103.06), (1.0, 1.0, 1.0)),
        **stride_settings(model, in_1x1=True),
        "roi_heads.box2box_transform.weights": [5.0, 5.0, 2.0, 2.0],
        "roi_heads.inclusive": True,
    }


def _notes(file: CheckpointFile, model: nn.Module) -> list[str]:
    lines = anchor_notes(model)
    if not caffe_stem(model):
        lines.append("the release pools without padding: set MODEL.CAFFE_RESNET.CEIL_POOL True")
    return lines


def _config(file: CheckpointFile) -> tuple[str, list[str]] | None:
    """The config of the released model with so many classes, and its depth."""
    bias = file.weights.get("arg:fcis_cls_seg_bias")
    if bias is None:
        return None
    overrides = []
    if not any(name.startswith("arg:res4b22_") for name in file.weights):
        overrides.append("MODEL.RESNETS.DEPTH=50")
    elif any(name.startswith("arg:res4b35_") for name in file.weights):
        overrides.append("MODEL.RESNETS.DEPTH=152")
    if len(bias) == 98 * 21:
        return "fcis_R_101_voc_sds.yaml", overrides
    if len(bias) != 98 * 81:
        overrides.append(f"MODEL.ROI_HEADS.NUM_CLASSES={len(bias) // 98 - 1}")
    return "fcis_R_101_coco.yaml", overrides


register_importer(
    Importer(
        name="mxnet-fcis",
        title="FCIS of MXNet",
        project="fcis",
        rules=fcis_rules,
        unused=[
            (r"fcis_bbox_(weight|bias)_test", "fcis_bbox times the standard deviations"),
            (r"fc1(000)?_(weight|bias)", "classifier of ImageNet"),
        ],
        prepare=strip_prefixes("arg:", "aux:"),
        settings=_settings,
        notes=_notes,
        config=_config,
    )
)
