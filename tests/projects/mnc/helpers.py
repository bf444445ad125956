"""Tiny MNC networks and their inputs."""

import torch

from d2ext.projects.mnc import add_mnc_config
from d2ext.utils.testing import tiny_config

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

MASK_SIZE = 7


def make_config(*overrides):
    """A tiny MNC on p2; overrides are KEY, VALUE, ..., keys without the prefix MODEL."""
    cfg = tiny_config(add_mnc_config)
    model = cfg.MODEL
    model.META_ARCHITECTURE = "MultitaskNetworkCascade"
    model.PROPOSAL_GENERATOR.NAME = "DifferentiableRPN"
    model.PROPOSAL_GENERATOR.MIN_SIZE = 4
    model.ANCHOR_GENERATOR.NAME = "RoundedAnchorGenerator"
    model.ANCHOR_GENERATOR.SIZES = [[12, 24]]
    model.ANCHOR_GENERATOR.OFFSET = 0.5
    model.RPN.IN_FEATURES = ["p2"]
    model.RPN.SMOOTH_L1_BETA = 1 / 9
    model.CAFFE_RPN.NORMALIZE_BOX_BY_SAMPLED = True
    model.ROI_HEADS.NAME = "MNCROIHeads"
    model.ROI_HEADS.IN_FEATURES = ["p2"]
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    model.ROI_HEADS.POSITIVE_FRACTION = 0.5
    model.MNC.WARP_SIZE = 8
    model.MNC.POOL_SIZE = 4
    model.MNC.WARP_QUANTIZE = False
    model.MNC.MASK_SIZE = MASK_SIZE
    model.MNC.MASK_FC_DIM = 12
    model.MNC.FC_DIM = 16
    cfg.merge_from_list([f"MODEL.{x}" if i % 2 == 0 else x for i, x in enumerate(overrides)])
    return cfg


def make_model(*overrides, seed=0):
    """A tiny MNC whose outputs differ visibly between boxes, classes and pixels."""
    torch.manual_seed(seed)
    model = build_model(make_config(*overrides))
    for name, parameter in model.named_parameters():
        if "bbox_pred" in name or "anchor_deltas" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "cls_score" in name or "mask_head" in name or "objectness" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ground_truth(boxes, classes, size=(40, 60)):
    """Instances with filled boxes as masks."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = True
    return Instances(
        size,
        gt_boxes=Boxes(boxes),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_masks=BitMasks(masks),
    )
