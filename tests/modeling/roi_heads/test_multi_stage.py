import pytest
import torch
from torch.nn import functional as F

import d2ext.modeling  # noqa: F401
from d2ext.modeling import ClampedBox2BoxTransform, MultiStageROIHeads, ProposalSampler
from d2ext.modeling.sampling import image_seeds
from d2ext.utils.testing import random_batch, tiny_config

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_roi_heads
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
SIZE = (64, 96)


def randomize(module, std=0.3):
    """Weights with which the stages disagree visibly, and boxes move."""
    for name, parameter in module.named_parameters():
        if "cls_score" in name or "bbox_pred" in name or "predictor" in name:
            torch.nn.init.normal_(parameter, std=std)


def cascade_config(name="MultiStageROIHeads"):
    """The settings under which it has to be detectron2's Cascade Mask R-CNN."""
    cfg = tiny_config()
    cfg.MODEL.ROI_HEADS.NAME = name
    stages = cfg.MODEL.MULTI_STAGE
    stages.STAGE_LOSS_WEIGHTS = [1.0, 1.0, 1.0]
    stages.RESAMPLE = False
    stages.SCORE_AVERAGE = "probs"
    stages.CLAMP_BOTH_SIDES = False
    stages.FEATURE_GRADIENT_SCALE = 1 / 3
    stages.MASK_HEAD_PER_STAGE = False
    return cfg


def build_heads(cfg, seed=0):
    torch.manual_seed(seed)
    heads = build_roi_heads(cfg, SHAPES)
    randomize(heads)
    return heads


def features(images=2, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            images, 8, SIZE[0] // s.stride, SIZE[1] // s.stride, generator=generator
        ).requires_grad_(requires_grad)
        for name, s in SHAPES.items()
    }


def proposals(images=2, count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(images):
        corners = torch.rand(count, 2, generator=generator) * 40
        extents = 10 + torch.rand(count, 2, generator=generator) * 14
        boxes = Boxes(torch.cat([corners, corners + extents], dim=1))
        result.append(Instances(SIZE, proposal_boxes=boxes))
    return result


def targets(**kwargs):
    return [x["instances"] for x in random_batch(**kwargs)]


def train(heads, features, proposals, targets):
    heads.train()
    with EventStorage() as storage, image_seeds(random_batch(len(targets))):
        losses = heads(None, features, proposals, targets)[1]
    return losses, storage.latest()


@pytest.fixture(scope="module")
def cascades():
    torch.manual_seed(0)
    theirs = build_model(cascade_config("CascadeROIHeads"))
    randomize(theirs.roi_heads, 0.05)
    ours = build_model(cascade_config())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_as_plain_cascade_it_trains_like_detectron2(cascades):
    losses = []
    for model in cascades:
        model.train()
        model.zero_grad()
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model(random_batch()))
        sum(losses[-1].values()).backward()
    ours, theirs = losses
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-6, abs=1e-6)
        assert theirs[name].item() > 0
    for (name, a), b in zip(cascades[0].named_parameters(), cascades[1].parameters()):
        assert torch.allclose(a.grad, b.grad, atol=2e-6), name


def test_as_plain_cascade_it_detects_like_detectron2(cascades):
    batch = random_batch()
    with torch.no_grad():
        results = [model.eval()(batch) for model in cascades]
    for ours, theirs in zip(*results):
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(theirs) == 10
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-6)
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        assert torch.equal(ours.pred_masks, theirs.pred_masks)


def lazy_heads(weights=((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)), num_masks=3):
    pooled = ShapeSpec(channels=8, height=7, width=7)
    pooler = L(ROIPooler)(
        output_size=7,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )
    mask_pooler = L(ROIPooler)(
        output_size=14,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )
    return L(MultiStageROIHeads)(
        num_classes=3,
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=pooler,
        box_heads=[
            L(FastRCNNConvFCHead)(input_shape=pooled, conv_dims=[], fc_dims=[16]) for _ in range(3)
        ],
        box_predictors=[
            L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=16),
                box2box_transform=L(ClampedBox2BoxTransform)(weights=list(map(float, w))),
                num_classes=3,
                cls_agnostic_bbox_reg=True,
                test_score_thresh=0.05,
                test_topk_per_image=10,
            )
            for w in weights
        ],
        samplers=[
            L(ProposalSampler)(num_classes=3, iou_threshold=iou, batch_size_per_image=32)
            for iou in (0.5, 0.6, 0.7)
        ],
        mask_in_features=["p2", "p3", "p4", "p5"],
        mask_pooler=mask_pooler,
        mask_head=[
            L(MaskRCNNConvUpsampleHead)(
                input_shape=ShapeSpec(channels=8, height=14, width=14),
                num_classes=3,
                conv_dims=[8, 8, 8],
            )
            for _ in range(num_masks)
        ],
        stage_loss_weights=[1.0, 0.5, 0.25],
    )


def default_config():
    cfg = tiny_config()
    cfg.MODEL.ROI_HEADS.NAME = "MultiStageROIHeads"
    return cfg


def test_yaml_and_lazy_build_the_same_heads():
    yaml, lazy = build_heads(default_config()), instantiate(lazy_heads())
    lazy.load_state_dict(yaml.state_dict())
    a, _ = train(yaml, features(), proposals(), targets())
    b, _ = train(lazy, features(), proposals(), targets())
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    results = [h.eval()(None, features(), proposals())[0][0] for h in (yaml, lazy)]
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(results[0].get(field), results[1].get(field))


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_scores_are_averaged_over_the_stages(average):
    cfg = default_config()
    cfg.MODEL.MULTI_STAGE.SCORE_AVERAGE = average
    heads = build_heads(cfg)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    if average == "logits":
        expected = F.softmax(x.mean(dim=0), dim=1)
    else:
        expected = F.softmax(x, dim=2).mean(dim=0)
    assert torch.allclose(heads.merge_stages(list(x)), expected, atol=1e-6)


def test_inference_refines_averages_and_suppresses():
    heads = build_heads(default_config()).eval()
    x, start = features(1), proposals(1)
    with torch.no_grad():
        boxes, logits = start[0].proposal_boxes.tensor, []
        for head, predictor in zip(heads.box_head, heads.box_predictor):
            pooled = heads.box_pooler([x[f] for f in ("p2", "p3", "p4", "p5")], [Boxes(boxes)])
            c, d = predictor(head(pooled))
            logits.append(c)
            boxes = predictor.box2box_transform.apply_deltas(d, boxes)
            boxes[:, 0::2].clamp_(0, SIZE[1])
            boxes[:, 1::2].clamp_(0, SIZE[0])
        scores = F.softmax(torch.stack(logits).mean(dim=0), dim=1)[:, :3]
        (result,) = heads(None, x, start)[0]
    assert len(result) == 10
    assert (result.scores[:-1] >= result.scores[1:]).all()
    for box, score, label in zip(result.pred_boxes, result.scores, result.pred_classes):
        row = (boxes - box).abs().sum(dim=1).argmin()
        assert torch.allclose(boxes[row], box, atol=1e-4)
        assert torch.allclose(scores[row, label], score, atol=1e-6)


def test_masks_are_averaged_over_the_stages():
    heads = build_heads(default_config()).eval()
    x = torch.randn(4, 8, 14, 14)
    classes = torch.tensor([0, 2, 1, 1])
    rows = torch.arange(4)
    with torch.no_grad():
        each = [head.layers(x)[rows, classes].sigmoid() for head in heads.mask_head]
        assert torch.allclose(heads.mask_probabilities(x, classes, 3), sum(each) / 3)
        assert torch.allclose(heads.mask_probabilities(x, classes, 1), each[0])


def test_stage_results_end_with_the_full_result_and_start_with_a_one_stage_detector():
    heads = build_heads(default_config()).eval()
    x, start = features(), proposals()
    with torch.no_grad():
        stages = heads.predict_stages(x, start)
        full = heads.predict(x, start)
        logits, deltas = heads.run_stage(x, [p.proposal_boxes for p in start], 0)
    assert len(stages) == 3
    for a, b in zip(stages[2], full):
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_masks, b.pred_masks)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    best = F.softmax(logits, dim=1)[:20, :3].max()
    assert torch.allclose(stages[0][0].scores[0], best)
    assert stages[0][0].pred_masks.shape == (10, 1, 28, 28)


def test_stage_weights_scale_the_losses_of_their_stage():
    results = []
    for weights in ([1.0, 1.0, 1.0], [1.0, 0.5, 0.25]):
        cfg = default_config()
        cfg.MODEL.MULTI_STAGE.STAGE_LOSS_WEIGHTS = weights
        results.append(train(build_heads(cfg), features(), proposals(), targets())[0])
    plain, weighted = results
    assert len(plain) == 9
    for name in plain:
        factor = 0.5 ** int(name[-1])
        assert weighted[name].item() == pytest.approx(plain[name].item() * factor, rel=1e-6)


def test_with_resampling_appended_objects_are_not_handed_on():
    heads = build_heads(default_config())
    gts = targets()
    samples = heads.samplers[0]([p.proposal_boxes for p in proposals()], gts, "test")
    refined = [s.proposal_boxes for s in samples]
    kept = heads.boxes_to_hand_on(samples, refined)
    assert [len(b) for b in kept] == [20, 20]
    for boxes, gt in zip(kept, gts):
        distance = (boxes.tensor[:, None] - gt.gt_boxes.tensor).abs().sum(dim=2)
        assert distance.min() > 0


def test_without_resampling_only_empty_boxes_are_dropped():
    heads = build_heads(cascade_config())
    boxes = Boxes(torch.tensor([[0.0, 0, 5, 5], [5, 5, 5, 9]]))
    (kept,) = heads.boxes_to_hand_on([None], [boxes])
    assert kept.tensor.tolist() == [[0, 0, 5, 5]]


def test_feature_gradient_scale_leaves_the_heads_alone():
    gradients = []
    for scale in (1.0, 0.25):
        cfg = default_config()
        cfg.MODEL.MULTI_STAGE.FEATURE_GRADIENT_SCALE = scale
        cfg.MODEL.MASK_ON = False
        heads = build_heads(cfg)
        x = features(requires_grad=True)
        losses, _ = train(heads, x, proposals(), targets())
        sum(losses.values()).backward()
        gradients.append((x["p2"].grad, heads.box_head[1].fc1.weight.grad))
    assert torch.allclose(gradients[1][0], gradients[0][0] * 0.25, atol=1e-7)
    assert torch.equal(gradients[1][1], gradients[0][1])


def test_without_mask_branch_no_masks_appear():
    cfg = default_config()
    cfg.MODEL.MASK_ON = False
    heads = build_heads(cfg)
    losses, _ = train(heads, features(), proposals(), targets())
    assert not any("mask" in name for name in losses)
    assert not heads.eval()(None, features(), proposals())[0][0].has("pred_masks")


def test_mask_branch_can_be_turned_off_for_a_while():
    heads = build_heads(default_config()).eval()
    heads.mask_on = False
    (result, _) = heads(None, features(), proposals())[0]
    assert not result.has("pred_masks")


@pytest.mark.parametrize("count, objects", [(0, 0), (0, 2), (5, 0)])
def test_missing_proposals_and_objects_train_every_parameter_with_zero_or_finite_gradient(
    count, objects
):
    heads = build_heads(default_config())
    x = features(requires_grad=True)
    losses, _ = train(heads, x, proposals(count=count), targets(num_objects=objects))
    assert len(losses) == 9
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert x["p2"].grad is not None


def test_inference_without_proposals_returns_empty_results():
    heads = build_heads(default_config()).eval()
    results, _ = heads(None, features(), proposals(count=0))
    assert [len(r) for r in results] == [0, 0]
    assert results[0].pred_masks.shape == (0, 1, 28, 28)


def test_statistics_of_every_stage_are_logged():
    _, logged = train(build_heads(default_config()), features(), proposals(), targets())
    for stage in range(3):
        total = sum(logged[f"stage{stage}/num_{kind}_samples"][0] for kind in ("fg", "bg"))
        assert total == 23  # proposals and objects of one image
        assert logged[f"stage{stage}/num_fg_samples"][0] >= 3
        assert 0 <= logged[f"stage{stage}/cls_accuracy"][0] <= 1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.MULTI_STAGE.SCORE_AVERAGE", "max", "neither 'logits' nor 'probs'"),
        ("MODEL.MULTI_STAGE.STAGE_LOSS_WEIGHTS", [1.0], "3 box_heads, but 1 stage_loss_weights"),
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False, "CLS_AGNOSTIC_BBOX_REG True"),
    ],
)
def test_impossible_settings_are_refused(key, value, message):
    cfg = default_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_heads(cfg)


def test_other_box_losses_than_smooth_l1_are_refused():
    cfg = default_config()
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = "giou"
    with pytest.raises(ValueError, match="BBOX_REG_LOSS_TYPE"):
        train(build_heads(cfg), features(), proposals(), targets())


def test_number_of_mask_heads_has_to_fit():
    with pytest.raises(ValueError, match="3 box_heads, but 2 mask_head"):
        instantiate(lazy_heads(num_masks=2))
