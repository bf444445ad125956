"""detectron2's Mask R-CNN and Cascade, with losses that do not depend on how a batch is spread."""

import pytest
import torch

import d2ext.modeling  # noqa: F401
from d2ext.config import check_registered_names
from d2ext.errors import UserError
from d2ext.modeling.parts import BatchInParts
from d2ext.modeling.regions.soft_nms import SoftNMS
from d2ext.utils.testing import random_batch, tiny_config, training_losses

from detectron2.modeling import build_model

OURS = {"mask_rcnn": "ReproducibleROIHeads", "cascade": "ReproducibleCascadeROIHeads"}
THEIRS = {"mask_rcnn": "StandardROIHeads", "cascade": "CascadeROIHeads"}
NETWORKS = pytest.mark.parametrize("name", OURS)


def build(name, ours):
    """The network of either kind, with the same weights."""
    cfg = tiny_config()
    if ours:
        cfg.MODEL.META_ARCHITECTURE = "ReproducibleRCNN"
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "ReproducibleRPN"
    cfg.MODEL.ROI_HEADS.NAME = (OURS if ours else THEIRS)[name]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 16  # so that sampling leaves something out
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    torch.manual_seed(0)
    return build_model(cfg)


@NETWORKS
def test_in_one_process_without_seeds_losses_are_those_of_detectron2(name):
    batch = random_batch()
    for x in batch:
        del x["sample_seed"], x["sem_seg"]
    found = []
    for ours in (True, False):
        model = build(name, ours)
        torch.manual_seed(1)
        found.append(training_losses(model, batch))
    assert found[0].keys() == found[1].keys()
    for key, loss in found[1].items():
        assert loss > 0
        torch.testing.assert_close(found[0][key], loss, rtol=1e-6, atol=0)


@NETWORKS
def test_predictions_and_parameters_are_those_of_detectron2(name):
    ours, theirs = build(name, True).eval(), build(name, False).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    batch = random_batch()
    with torch.no_grad():
        for a, b in zip(ours(batch), theirs(batch)):
            assert torch.equal(a["instances"].scores, b["instances"].scores)
            assert torch.equal(a["instances"].pred_masks, b["instances"].pred_masks)


@NETWORKS
def test_what_is_drawn_for_an_image_depends_on_its_seed_only(name):
    model, batch = build(name, True), random_batch()

    def losses(inputs):
        return {k: v.item() for k, v in training_losses(model, inputs).items()}

    torch.manual_seed(1)
    state, first = torch.get_rng_state(), losses(batch)
    assert torch.equal(state, torch.get_rng_state())  # of which nothing was taken
    torch.manual_seed(2)
    assert losses(batch) == first
    alone = [losses([x])["loss_rpn_cls"] for x in batch]
    assert sum(alone) / 2 == pytest.approx(first["loss_rpn_cls"], rel=1e-5)
    for x in batch:
        x["sample_seed"] += 1
    assert losses(batch) != first


@NETWORKS
def test_losses_of_parts_add_up_to_those_of_the_batch(name):
    """Images with unequal numbers of regions: without objects there are fewer positives."""
    model = build(name, True)
    batch = random_batch(1) + random_batch(1, num_objects=0, seed=1)
    # As in d2ext.engine: all counts first, then the losses.
    whole = training_losses(model, batch)
    together = BatchInParts(batch, 2)
    for part in together.parts:
        with together.measuring(), torch.no_grad():
            training_losses(model, part)
    assert together.has_counts
    sums = dict.fromkeys(whole, 0.0)
    means = dict.fromkeys(whole, 0.0)
    for part in together.parts:
        with together.computing():
            losses = training_losses(model, part)
        plain = training_losses(build(name, False), part)
        for key in whole:
            sums[key] += losses[key].item() / 2
            means[key] += plain[key].item() / 2
    for key, loss in whole.items():
        assert sums[key] == pytest.approx(loss.item(), rel=1e-4), key
    # detectron2's own differ, or this test could not fail.
    assert means["loss_mask"] != pytest.approx(whole["loss_mask"].item(), rel=1e-2)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_of_the_cascade_keeps_what_nms_keeps_and_more(method):
    hard = build("cascade", True).eval()
    cfg = tiny_config()
    cfg.MODEL.ROI_HEADS.NAME = OURS["cascade"]
    cfg.MODEL.SOFT_NMS.METHOD, cfg.MODEL.SOFT_NMS.SIGMA = method, 0.3
    cfg.MODEL.SOFT_NMS.MIN_SCORE = 1e-4
    soft = build_model(cfg).eval()
    assert soft.roi_heads.soft_nms == SoftNMS(method, 0.5, 0.3, 1e-4)
    soft.load_state_dict(hard.state_dict())
    for model in (hard, soft):
        model.roi_heads.box_predictor[-1].test_score_thresh = 0.01
        model.roi_heads.box_predictor[-1].test_topk_per_image = -1
    batch = random_batch(1)
    with torch.no_grad():
        removed, lowered = (m(batch)[0]["instances"] for m in (hard, soft))
    assert len(lowered) > len(removed) > 0 and lowered.has("pred_masks")
    assert torch.equal(lowered.scores[0], removed.scores[0])
    every = {tuple(box) for box in lowered.pred_boxes.tensor.tolist()}
    assert {tuple(box) for box in removed.pred_boxes.tensor.tolist()} <= every


def test_soft_nms_without_an_effect_is_refused():
    cfg = tiny_config()
    cfg.MODEL.SOFT_NMS.METHOD = "linear"
    for name in ("CascadeROIHeads", "StandardROIHeads"):
        cfg.MODEL.ROI_HEADS.NAME = name
        with pytest.raises(UserError, match=f"METHOD has no effect in {name}; Reproducible"):
            check_registered_names(cfg)
    cfg.MODEL.ROI_HEADS.NAME = OURS["cascade"]
    check_registered_names(cfg)
