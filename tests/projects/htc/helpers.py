"""Tiny HTC networks and their inputs."""

import torch

from d2ext.projects.htc import add_htc_config
from d2ext.utils.testing import tiny_config

from detectron2.modeling import build_model

STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def make_config(*overrides):
    """A tiny HTC; overrides are KEY, VALUE, ..., keys without the prefix MODEL."""
    cfg = tiny_config(add_htc_config)
    model = cfg.MODEL
    model.META_ARCHITECTURE = "HybridTaskCascade"
    model.PROPOSAL_GENERATOR.NAME = "InsideAnchorRPN"
    model.RPN.SMOOTH_L1_BETA = 0.1111
    model.ROI_HEADS.NAME = "HTCROIHeads"
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.001
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
    model.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0
    model.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS = [[1 / s for s in std] for std in STDS]
    model.SEM_SEG_HEAD.NUM_CLASSES = 7
    model.HTC.SEMANTIC.CONV_DIM = 8
    model.HTC.SEMANTIC.NUM_CONV = 2
    cfg.merge_from_list([f"MODEL.{x}" if i % 2 == 0 else x for i, x in enumerate(overrides)])
    return cfg


def make_model(*overrides, seed=0):
    """A tiny HTC whose outputs differ visibly between stages, classes and boxes."""
    torch.manual_seed(seed)
    model = build_model(make_config(*overrides))
    for name, parameter in model.roi_heads.named_parameters():
        if "cls_score" in name or "bbox_pred" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "predictor" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def pyramid(images=2, size=(64, 96), seed=0):
    """Random features p2..p6 of 8 channels, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"p{i}": torch.randn(
            images, 8, size[0] // 2**i, max(size[1] // 2**i, 2), generator=generator
        ).requires_grad_()
        for i in range(2, 7)
    }
