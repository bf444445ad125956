"""Losses, gradients and mask scores of the whole detector."""

import pytest
import torch

from d2ext.errors import UserError
from d2ext.modeling.test_time_augmentation import with_test_time_augmentation
from d2ext.utils.testing import as_double, random_batch, training_losses
from mask_scoring import mask_iou_targets
from mask_scoring.roi_heads import mask_iou_loss

from detectron2.modeling import build_model


@pytest.fixture
def model(cfg):
    return build_model(cfg)


@torch.no_grad()
def predict(model, batch):
    model.eval().roi_heads.box_predictor.test_score_thresh = 0.0
    return [x["instances"] for x in model(batch)]


def test_loss_is_half_the_mean_square_over_masks_that_overlap():
    predicted = as_double([0.5, 0.25, -1.0, 2.0]).requires_grad_()
    targets = as_double([0.75, 0.0, 0.5, 1.0])
    loss = mask_iou_loss(predicted.float(), targets.float())
    assert loss.item() == pytest.approx(0.5 * (0.25**2 + 1.5**2 + 1.0**2) / 3)
    loss.backward()
    torch.testing.assert_close(predicted.grad, as_double([-0.25, 0.0, -1.5, 1.0]) / 3)
    nothing = mask_iou_loss(predicted, torch.zeros(4))
    assert nothing.item() == 0 and nothing.requires_grad


def test_training_reaches_the_new_head_the_mask_head_and_the_backbone(model):
    losses = training_losses(model, random_batch())
    assert {"loss_mask", "loss_mask_iou"} < losses.keys() and losses["loss_mask_iou"] > 0
    losses["loss_mask_iou"].backward()
    parts = (model.roi_heads.mask_iou_head.parameters(), model.roi_heads.mask_head.parameters())
    for parameters in (*parts, model.backbone.bottom_up.parameters()):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_only_the_iou_of_the_right_class_is_learnt(model):
    batch = random_batch()
    for x in batch:
        x["instances"].gt_classes[:] = 1
    training_losses(model, batch)["loss_mask_iou"].backward()
    rows = model.roi_heads.mask_iou_head.predictor.weight.grad.abs().sum(1)
    assert rows[1] > 0 and rows[0] == rows[2] == 0


def test_images_without_objects_train(model):
    losses = training_losses(model, random_batch(num_objects=0))
    assert losses["loss_mask_iou"] == 0
    sum(losses.values()).backward()


def test_mask_score_is_box_score_times_iou_of_the_class_and_survives_the_resizing(model):
    batch = random_batch()
    for x in batch:  # results are wanted for an image of twice the size
        x["height"], x["width"] = 2 * x["height"], 2 * x["width"]
    seen = []
    hook = model.roi_heads.mask_iou_head.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model.roi_heads.mask_iou_head.predictor.bias.copy_(torch.tensor([0.2, 0.5, 0.9]))
    found = predict(model, batch)
    hook.remove()
    assert sum(map(len, found)) == len(seen[0]) > 0
    for x, ious in zip(found, seen[0].split([len(x) for x in found])):
        assert x.image_size == (128, 192)
        expected = [s * row[c] for s, row, c in zip(x.scores, ious, x.pred_classes)]
        torch.testing.assert_close(x.mask_scores, torch.stack(expected))


def test_the_switch_leaves_masks_to_the_scores_of_their_boxes(cfg):
    cfg.MODEL.MASK_SCORING.RESCORE = False
    assert not predict(build_model(cfg), random_batch())[0].has("mask_scores")


def test_class_agnostic_masks_have_an_iou_for_each_class(cfg):
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    model = build_model(cfg)
    assert training_losses(model, random_batch())["loss_mask_iou"] > 0
    assert predict(model, random_batch())[0].has("mask_scores")


def test_test_time_augmentation_works(model):
    predict(model, random_batch())
    augmented = with_test_time_augmentation(model, min_sizes=[48, 64], max_size=100)
    assert len(augmented(random_batch())[0]["instances"]) > 0


def test_a_network_without_masks_is_refused(cfg):
    cfg.MODEL.MASK_ON = False
    with pytest.raises(UserError, match="MODEL.MASK_ON=True"):
        build_model(cfg)


def test_the_head_learns_to_tell_good_masks_from_bad_ones(cfg):
    """Masks of known quality, a few steps of the head alone."""
    model = build_model(cfg)
    head = model.roi_heads.mask_iou_head
    batch = random_batch(num_images=1, num_objects=3)
    regions = batch[0]["instances"]
    regions.proposal_boxes = regions.gt_boxes
    truth = regions.gt_masks.crop_and_resize(regions.gt_boxes.tensor, 28).float()[:, None]
    half = truth.clone()
    half[..., :14] = 0
    features = torch.zeros(3, 8, 14, 14)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(60):
        loss = sum(
            mask_iou_loss(head(features, m)[:, 0], mask_iou_targets(m, [regions]))
            for m in (truth, half)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    good, bad = (head(features, m)[:, 0].mean().item() for m in (truth, half))
    assert good > 0.85 and bad < 0.65
