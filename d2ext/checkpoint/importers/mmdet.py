"""Detectors of MMDetection 2.x and 3.x (whose names are the same) for models of detectron2's names:
Mask R-CNN, Cascade Mask R-CNN, with ResNet- or ResNeXt-FPN, Swin or ConvNeXt."""

import re
from typing import Any

from torch import Tensor, nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.importers.common import TORCHVISION_PIXELS, pixel_settings, stride_settings
from d2ext.checkpoint.importers.mmdet_timm import (
    SWIN_UNUSED,
    mmdet_convnext_rules,
    mmdet_swin_rules,
)
from d2ext.checkpoint.importers.resnet import strip_prefixes, torch_resnet_rules
from d2ext.checkpoint.mapping import Rule
from d2ext.checkpoint.registry import Importer, register_importer

MMDET_UNUSED = [
    (r".*\.num_batches_tracked", "a counter"),
    SWIN_UNUSED,
    (r"data_preprocessor\.(mean|std)", "constants of the config"),
    (r"ema_.*", "moving averages of the training"),
]
# Standard deviations of the box deltas of each stage.
STAGE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def mmdet_rules() -> list[Rule]:
    """Names of backbone, pyramid, RPN, box and mask heads; `{t}` is the stage of a cascade."""
    rules = torch_resnet_rules("backbone.bottom_up.", "backbone.")
    rules += mmdet_swin_rules() + mmdet_convnext_rules()
    rules += [
        Rule("backbone.fpn_lateral{n}.{p:w}", "neck.lateral_convs.{n-2}.conv.{p}"),
        Rule("backbone.fpn_output{n}.{p:w}", "neck.fpn_convs.{n-2}.conv.{p}"),
    ]
    ours, theirs = "proposal_generator.rpn_head.", "rpn_head."
    rules += [
        Rule(f"{ours}conv.{{p:w}}", f"{theirs}rpn_conv.{{p}}"),
        Rule(f"{ours}objectness_logits.{{p:w}}", f"{theirs}rpn_cls.{{p}}"),
        Rule(f"{ours}anchor_deltas.{{p:w}}", f"{theirs}rpn_reg.{{p}}"),
    ]
    for stage in ("{t}.", ""):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        # detectron2's cascade has one mask head.
        masks = [mask] if stage else [mask, "roi_head.mask_head.2."]
        predictor, head = f"roi_heads.box_predictor.{stage}", f"roi_heads.mask_head.{stage}"
        rules += [
            Rule(f"roi_heads.box_head.{stage}fc{{n}}.{{p:w}}", f"{box}shared_fcs.{{n-1}}.{{p}}"),
            Rule(f"{predictor}cls_score.{{p:w}}", f"{box}fc_cls.{{p}}", per_class=True),
            Rule(f"{predictor}bbox_pred.{{p:w}}", f"{box}fc_reg.{{p}}", per_class=True),
            Rule(f"{head}mask_fcn{{n}}.{{p:w}}", [f"{x}convs.{{n-1}}.conv.{{p}}" for x in masks]),
            Rule(f"{head}deconv.{{p:w}}", [f"{x}upsample.{{p}}" for x in masks]),
            Rule(
                f"{head}predictor.{{p:w}}", [f"{x}conv_logits.{{p}}" for x in masks], per_class=True
            ),
        ]
    return rules


def config_text(file: CheckpointFile) -> str:
    """The MMDetection config inside a checkpoint, "" if there is none."""
    meta = file.rest.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    found = meta.get("config") or meta.get("cfg")
    return found if isinstance(found, str) else ""


def mmdet_settings(file: CheckpointFile, model: nn.Module) -> dict[str, Any]:
    """Pixels and strides, as the config in the checkpoint says, else those of the PyTorch-style
    ResNets that nearly all published models have."""
    text = config_text(file)
    order, mean, std = TORCHVISION_PIXELS
    mean, std = _numbers(text, "mean") or mean, _numbers(text, "std") or std
    found = re.search(r"\b(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)", text)
    if found and found[1] == "False":
        order = "BGR"
    caffe = bool(re.search(r"\bstyle\s*=\s*'caffe'", text))
    return {
        **pixel_settings(model, order, mean, std),
        **stride_settings(model, in_1x1=caffe),
        **box_scale_settings(model),
    }


def _numbers(text: str, name: str) -> list[float]:
    found = re.search(rf"\b{name}\s*=\s*\[([\d\s.,]{{5,200}})\]", text)
    values = [float(x) for x in found[1].split(",") if x.strip()] if found else []
    return values if len(values) == 3 else []


def box_scale_settings(model: nn.Module) -> dict[str, Any]:
    """Reciprocals of the standard deviations of the deltas of each stage."""
    predictor = getattr(model.roi_heads, "box_predictor", None)
    path = "roi_heads.box_predictor."
    stages = len(predictor) if isinstance(predictor, nn.ModuleList) else None
    paths = [path] if stages is None else [f"{path}{t}." for t in range(stages)]
    return {
        f"{x}box2box_transform.weights": [1 / s for s in std] for x, std in zip(paths, STAGE_STDS)
    }


def refuse_mmdet_1(weights: dict[str, Tensor]) -> str:
    """Why a checkpoint of MMDetection 1.x is of no use."""
    if any(x.startswith(("bbox_head.", "mask_head.", "semantic_head.")) for x in weights) and any(
        x.startswith("rpn_head.") for x in weights
    ):
        return (
            "it is of MMDetection 1.x, whose boxes and RoIAlign differ and whose background comes "
            "first; take the one of 2.x from its model zoo"
        )
    return ""


def mmdet_metadata(file: CheckpointFile) -> dict[str, Any]:
    """`thing_classes`, if the checkpoint names them, and `semantic_labels`, their number, if it
    has a semantic branch."""
    labels = file.weights.get("roi_head.semantic_head.conv_logits.bias")
    found = {} if labels is None else {"semantic_labels": len(labels)}
    meta = file.rest.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    data = meta.get("dataset_meta")
    names = meta.get("CLASSES")
    if isinstance(data, dict):
        names = data.get("CLASSES") or data.get("classes")
    if isinstance(names, (list, tuple)) and names and all(isinstance(x, str) for x in names):
        return {"thing_classes": list(names), **found}
    return found


def _notes(file: CheckpointFile, model: nn.Module) -> list[str]:
    lines = []
    if any(x.startswith("roi_head.mask_head.2.") for x in file.weights):
        if not isinstance(getattr(model.roi_heads, "mask_head", None), nn.ModuleList):
            lines.append(
                "MMDetection averages three mask heads and the class logits; detectron2's cascade "
                "has the last mask head and averages probabilities; HTCROIHeads can do the former"
            )
    return lines


register_importer(
    Importer(
        name="mmdet",
        title="MMDetection",
        rules=lambda model: mmdet_rules(),
        unused=[
            *MMDET_UNUSED,
            (r"roi_head\.mask_head\.[01]\..*", "detectron2's cascade has one mask head: the last"),
        ],
        prepare=strip_prefixes("module."),
        refuse=refuse_mmdet_1,
        settings=mmdet_settings,
        notes=_notes,
        metadata=mmdet_metadata,
        exports=True,
    )
)
