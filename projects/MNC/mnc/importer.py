"""The authors' Caffe checkpoints for this project's VGG-16 models: the trained five-stage network
(`.caffemodel.h5`), and the ImageNet network that training starts from (`.caffemodel`, also
torchvision's `.pth`)."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from d2ext.checkpoint.formats import CheckpointFile
from d2ext.checkpoint.importers.common import anchor_notes, one_logit, pixel_settings
from d2ext.checkpoint.importers.resnet import strip_prefixes
from d2ext.checkpoint.importers.vgg import (
    caffe_vgg_rules,
    caffe_vgg_settings,
    torch_vgg_rules,
    torch_vgg_settings,
)
from d2ext.checkpoint.mapping import Rule
from d2ext.checkpoint.registry import Importer, register_importer
from d2ext.projects.mnc.roi_heads import MNCROIHeads

_BLOBS = {"weight": 0, "bias": 1}
_FC = {"box_fc6": "fc6", "box_fc7": "fc7", "mask_fc6": "fc6_mask", "mask_fc7": "fc7_mask"}


def background_row_last(x: Tensor) -> Tensor:
    """Rows of the classes with the background first -> last."""
    return x.roll(-1, dims=0)


def scaled_deltas(x: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Rows of raw box deltas, four per class with the background first -> without it, multiplied by
    the weights of the model's box transform. The release writes its standard deviations into the
    weights when it saves them."""
    rows = x[4:].unflatten(0, (-1, 4))
    factor = torch.tensor(weights, dtype=x.dtype, device=x.device)
    return (rows * factor.view(4, *[1] * (x.dim() - 1))).flatten(0, 1)


def mnc_rules(model: nn.Module) -> list[Rule]:
    """Names of backbone, RPN and the heads, whose layers all passes share."""
    rpn, mask, category = (
        "proposal_generator.rpn_head.",
        "roi_heads.mask_head.",
        "roi_heads.category_head.",
    )
    if not isinstance(getattr(model, "roi_heads", None), MNCROIHeads):
        return []
    deltas = functools.partial(scaled_deltas, weights=tuple(model.roi_heads.box_transform.weights))
    rules = caffe_vgg_rules()
    for part, blob in _BLOBS.items():
        rules += [
            Rule(f"{rpn}conv.{part}", [f"rpn_conv_3x3.{blob}", f"rpn_conv/3x3.{blob}"]),
            Rule(
                f"{rpn}objectness_logits.{part}",
                f"rpn_cls_score.{blob}",
                one_logit,
                label="foreground minus background",
            ),
            Rule(f"{rpn}anchor_deltas.{part}", f"rpn_bbox_pred.{blob}"),
            Rule(f"{mask}fc1.{part}", f"fc6_maskest.{blob}"),
            Rule(f"{mask}fc2.{part}", f"mask_pred.{blob}"),
            Rule(
                f"{category}bbox_pred.{part}",
                f"bbox_pred.{blob}",
                deltas,
                per_class=True,
                label="without background, times the box weights",
            ),
        ]
        for name in ("cls_score", "seg_cls_score"):
            rules.append(
                Rule(
                    f"{category}{name}.{part}",
                    f"{name}.{blob}",
                    background_row_last,
                    per_class=True,
                    label="background last",
                )
            )
        rules += [Rule(f"{category}{k}.{part}", f"{v}.{blob}") for k, v in _FC.items()]
    return rules


def _prepare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`data/conv1_1/0` of HDF5 -> `conv1_1.0` as in the binary files."""
    return {
        ".".join(k[len("data/") :].rsplit("/", 1)) if k.startswith("data/") else k: v
        for k, v in weights.items()
    }


def _settings(file: CheckpointFile, model: nn.Module) -> dict[str, Any]:
    """Pixels, and the box decoder that grows boxes by a pixel, with which the network was trained
    and tested."""
    return {
        **pixel_settings(model, "BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
        "roi_heads.box_transform.plus_one": True,
        "proposal_generator.box2box_transform.plus_one": True,
        "voting.legacy_plus_one": True,
    }


def _notes(file: CheckpointFile, model: nn.Module) -> list[str]:
    return [
        "which of the release's two RoI operators these weights were trained with is not known: "
        "also try MODEL.MNC.WARP_SIZE 14 with WARP_BIN_REDUCE edge_max",
        *anchor_notes(model),
    ]


def _config(file: CheckpointFile) -> tuple[str, list[str]] | None:
    bias = _prepare(file.weights).get("seg_cls_score.1")
    if bias is None:
        return None
    overrides = [] if len(bias) == 21 else [f"MODEL.ROI_HEADS.NUM_CLASSES={len(bias) - 1}"]
    return "mnc_vgg16_voc_sds.yaml", overrides


def _image_net_config(file: CheckpointFile) -> tuple[str, list[str]] | None:
    names = set(file.weights)
    found = {"conv5_3.0", "features.28.weight"} & names
    return ("mnc_vgg16_voc_sds.yaml", []) if found else None


def _caffe_image_net_rules(model: nn.Module) -> list[Rule]:
    if not isinstance(getattr(model, "roi_heads", None), MNCROIHeads):
        return []
    category, rules = "roi_heads.category_head.", caffe_vgg_rules()
    for part, blob in _BLOBS.items():
        for ours, theirs in _FC.items():
            plain = theirs.removesuffix("_mask")
            rules.append(Rule(f"{category}{ours}.{part}", [f"{theirs}.{blob}", f"{plain}.{blob}"]))
    return rules


def _torch_image_net_rules(model: nn.Module) -> list[Rule]:
    if not isinstance(getattr(model, "roi_heads", None), MNCROIHeads):
        return []
    category, rules = "roi_heads.category_head.", torch_vgg_rules()
    for ours, theirs in _FC.items():
        position = 0 if theirs.startswith("fc6") else 3
        rules.append(Rule(f"{category}{ours}.{{p:w}}", f"classifier.{position}.{{p}}"))
    return rules


register_importer(
    Importer(
        name="caffe-mnc",
        title="MNC of Caffe",
        project="mnc",
        rules=mnc_rules,
        unused=[(r".*_ext\.[01]", "a copy: the second pass shares the layers of the first")],
        prepare=_prepare,
        settings=_settings,
        notes=_notes,
        config=_config,
    )
)
register_importer(
    Importer(
        name="caffe-mnc-imagenet",
        title="VGG-16 of Caffe",
        project="mnc",
        rules=_caffe_image_net_rules,
        unused=[(r"fc8\.[01]", "classifier of ImageNet")],
        partial=True,
        settings=caffe_vgg_settings,
        config=_image_net_config,
    )
)
register_importer(
    Importer(
        name="torchvision-mnc-imagenet",
        title="VGG-16 of torchvision",
        project="mnc",
        rules=_torch_image_net_rules,
        unused=[(r"classifier\.6\..*", "classifier of ImageNet")],
        partial=True,
        prepare=strip_prefixes("module."),
        settings=torch_vgg_settings,
    )
)
