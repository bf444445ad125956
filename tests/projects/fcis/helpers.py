"""Tiny FCIS networks and their inputs."""

import torch

from d2ext.modeling import ClampedBox2BoxTransform
from d2ext.ops import MaskVoting
from d2ext.projects.fcis import FCISROIHeads, RegionSampler, add_fcis_config
from d2ext.utils.testing import tiny_config

from detectron2.modeling import build_model


def make_config(*overrides):
    """A tiny FCIS on stride 8; overrides are KEY, VALUE, ..., keys without the prefix MODEL."""
    cfg = tiny_config(add_fcis_config)
    model = cfg.MODEL
    model.META_ARCHITECTURE = "FCIS"
    model.PROPOSAL_GENERATOR.NAME = "CaffeRPN"
    model.ANCHOR_GENERATOR.NAME = "RoundedAnchorGenerator"
    model.ANCHOR_GENERATOR.SIZES = [[16, 32]]
    model.ANCHOR_GENERATOR.OFFSET = 0.5
    model.RPN.IN_FEATURES = ["p3"]
    model.RPN.SMOOTH_L1_BETA = 1 / 9
    model.ROI_HEADS.NAME = "FCISROIHeads"
    model.ROI_HEADS.NMS_THRESH_TEST = 0.3
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.001
    model.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = [5.0, 5.0, 2.0, 2.0]
    model.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0
    model.FCIS.IN_FEATURE = "p3"
    model.FCIS.CONV_DIM = 8
    model.FCIS.GROUP_SIZE = 3
    model.FCIS.OUT_SIZE = 6
    cfg.merge_from_list([f"MODEL.{x}" if i % 2 == 0 else x for i, x in enumerate(overrides)])
    return cfg


def make_model(*overrides, seed=0):
    """A tiny FCIS whose outputs differ visibly between classes, parts and boxes."""
    torch.manual_seed(seed)
    model = build_model(make_config(*overrides))
    for parameter in model.roi_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.anchor_deltas.weight, std=0.1)
    return model


def make_heads(num_classes=2, **arguments):
    """Region heads without the rest of the network; the defaults are the release's."""
    arguments = {
        "in_channels": 4,
        "conv_dim": 4,
        "sampler": RegionSampler(num_classes=num_classes),
        "box2box_transform": ClampedBox2BoxTransform(
            [5.0, 5.0, 2.0, 2.0], scale_clamp=float("inf")
        ),
        "voting": MaskVoting(score_threshold=0.001),
        **arguments,
    }
    return FCISROIHeads(num_classes=num_classes, **arguments)
