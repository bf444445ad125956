"""Checkpoints of MMDetection's HTC, and of its Cascade Mask R-CNN, for this project's models."""

from typing import Any

from torch import nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.importers.mmdet import (
    MMDET_UNUSED,
    mmdet_metadata,
    mmdet_rules,
    mmdet_settings,
    refuse_mmdet_1,
)
from d2ext.checkpoint.importers.resnet import strip_prefixes
from d2ext.checkpoint.mapping import Rule
from d2ext.checkpoint.registry import Importer, register_importer
from d2ext.modeling import ClampedBox2BoxTransform
from d2ext.projects.htc.roi_heads import HTCROIHeads


def htc_rules() -> list[Rule]:
    """MMDetection's names, with those of the mask information flow and the semantic branch."""
    ours, theirs = "roi_heads.semantic_head.", "roi_head.semantic_head."
    return [
        *mmdet_rules(),
        Rule("roi_heads.mask_head.{t}.conv_res.{p:w}", "roi_head.mask_head.{t}.conv_res.conv.{p}"),
        Rule(f"{ours}lateral_convs.{{n}}.{{p:w}}", f"{theirs}lateral_convs.{{n}}.conv.{{p}}"),
        Rule(f"{ours}convs.{{n}}.{{p:w}}", f"{theirs}convs.{{n}}.conv.{{p}}"),
        Rule(f"{ours}conv_embedding.{{p:w}}", f"{theirs}conv_embedding.conv.{{p}}"),
        Rule(f"{ours}conv_logits.{{p:w}}", f"{theirs}conv_logits.{{p}}", per_class=True),
    ]


def _settings(file: CheckpointFile, model: nn.Module) -> dict[str, Any]:
    return {
        **mmdet_settings(file, model),
        "roi_heads.score_average": "logits",
        "roi_heads.mask_ensemble": "mean",
    }


def _notes(file: CheckpointFile, model: nn.Module) -> list[str]:
    transforms = [x.box2box_transform for x in model.roi_heads.box_predictor]
    if all(isinstance(x, ClampedBox2BoxTransform) for x in transforms):
        return []
    return ["MMDetection limits the size of boxes on both sides: MODEL.HTC.CLAMP_BOTH_SIDES True"]


def _config(file: CheckpointFile) -> tuple[str, list[str]]:
    """The config of a published variant, and what else its shapes ask for."""
    weights = file.weights
    prefix = "backbone.layer3."
    blocks = len({x[len(prefix) :].split(".")[0] for x in weights if x.startswith(prefix)})
    depth = 101 if blocks > 6 else 50
    overrides = []
    if any("conv2.conv_offset." in x or "conv2_offset." in x for x in weights):
        name = "htc_X_101_64x4d_FPN_dcn_ms_20e_coco.yaml"
    elif not any("semantic_head." in x for x in weights):
        flow = any(".conv_res." in x for x in weights)
        name = "htc_without_semantic_R_50_FPN_1x_coco.yaml"
        name = name if flow else "htc_ablation_cascade_R_50_FPN_20e_coco.yaml"
        overrides.append(f"MODEL.RESNETS.DEPTH={depth}")
    else:
        name = f"htc_R_{depth}_FPN_20e_coco.yaml"
    conv = weights.get("backbone.layer1.0.conv2.weight")
    if conv is not None and conv.dim() == 4 and 0 < conv.shape[1] < conv.shape[0]:
        groups = conv.shape[0] // conv.shape[1]
        overrides.append(f"MODEL.RESNETS.NUM_GROUPS={groups}")
        overrides.append(f"MODEL.RESNETS.WIDTH_PER_GROUP={conv.shape[1]}")
    for key, source, more in (
        ("MODEL.ROI_HEADS.NUM_CLASSES", "roi_head.bbox_head.0.fc_cls.bias", 1),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "roi_head.semantic_head.conv_logits.bias", 0),
    ):
        if source in weights:
            overrides.append(f"{key}={len(weights[source]) - more}")
    return name, overrides


register_importer(
    Importer(
        name="mmdet-htc",
        title="MMDetection HTC",
        project="htc",
        rules=lambda model: (
            htc_rules() if isinstance(getattr(model, "roi_heads", None), HTCROIHeads) else []
        ),
        unused=MMDET_UNUSED,
        prepare=strip_prefixes("module."),
        refuse=refuse_mmdet_1,
        settings=_settings,
        notes=_notes,
        metadata=mmdet_metadata,
        config=_config,
        exports=True,
    )
)
