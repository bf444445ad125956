import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling import MultiStageROIHeads
from d2ext.modeling.cascade.from_config import cascade_from_config
from d2ext.modeling.regions.sampling import image_seeds
from d2ext.utils.testing import random_batch, tiny_config

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.mask_head import build_mask_head
from detectron2.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
SIZE = (64, 96)


def randomize(module, std=0.3):
    """Weights with which the stages disagree visibly, and boxes move."""
    for name, parameter in module.named_parameters():
        if "cls_score" in name or "bbox_pred" in name or "predictor" in name:
            torch.nn.init.normal_(parameter, std=std)


@ROI_HEADS_REGISTRY.register()
class AsDetectron2(MultiStageROIHeads):
    """The settings under which it has to be detectron2's Cascade Mask R-CNN: sampling and masks in
    the first stage only, no limit to shrinking, equal weights, and a third of the gradient."""

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments, shape = cascade_from_config(cfg, input_shape)
        for sampler in arguments["samplers"][1:]:
            sampler.batch_size_per_image, sampler.append_gt = -1, False
        for predictor in arguments["box_predictors"]:
            predictor.box2box_transform = Box2BoxTransform(predictor.box2box_transform.weights)
        return {
            **arguments,
            "mask_head": [build_mask_head(cfg, shape), nn.Identity(), nn.Identity()],
            "stage_loss_weights": [1.0, 1.0, 1.0],
            "score_average": "probs",
        }

    def pool_box_features(self, features, boxes):
        x = super().pool_box_features(features, boxes)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / 3)
        return x

    def boxes_to_hand_on(self, samples, refined):
        return [boxes[boxes.nonempty()] for boxes in refined]

    def mask_losses(self, features, samples, targets, stage):
        if stage > 0:
            return {}
        losses = super().mask_losses(features, samples, targets, stage)
        return {"loss_mask": losses["loss_mask_stage0"]}

    def mask_probabilities(self, x, classes, stages):
        return super().mask_probabilities(x, classes, 1)


def cascade_config(name):
    cfg = tiny_config()
    cfg.MODEL.ROI_HEADS.NAME = name
    # one pooler for ours and detectron2's heads, so that results are equal to the last bit
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "PyramidROIAlign"
    return cfg


def build_heads(cfg, seed=0, **arguments):
    torch.manual_seed(seed)
    heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, SHAPES, **arguments)
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
    ours = build_model(cascade_config("AsDetectron2"))
    weights = {k.replace("mask_head.", "mask_head.0."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(weights)
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


def default_config():
    return cascade_config("PlainCascade")


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_scores_are_averaged_over_the_stages(average):
    heads = build_heads(default_config(), score_average=average)
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


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_lowers_scores_where_nms_removes_boxes(method):
    hard = build_heads(default_config()).eval()
    options = {"soft_nms": method, "soft_nms_sigma": 0.3, "soft_nms_min_score": 0.01}
    soft = build_heads(default_config(), **options).eval()
    soft.load_state_dict(hard.state_dict())
    for heads in (hard, soft):
        heads.box_predictor[-1].test_topk_per_image = 1000
        heads.box_predictor[-1].test_score_thresh = 0.01
    with torch.no_grad():
        (removed,), (lowered,) = (h(None, features(1), proposals(1))[0] for h in (hard, soft))
    assert len(lowered) > len(removed) > 0
    assert torch.equal(lowered.scores, lowered.scores.sort(descending=True).values)
    assert lowered.scores.min() >= 0.01
    # What NMS keeps first, nothing better overlaps.
    assert torch.equal(lowered.scores[0], removed.scores[0])
    assert torch.equal(lowered.pred_boxes.tensor[0], removed.pred_boxes.tensor[0])
    assert lowered.pred_masks.shape == (len(lowered), 1, *removed.pred_masks.shape[2:])
    before = {tuple(b): s for b, s in zip(removed.pred_boxes.tensor.tolist(), removed.scores)}
    after = [tuple(b) for b in lowered.pred_boxes.tensor.tolist()]
    assert set(before) <= set(after)


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
        heads = build_heads(default_config(), stage_loss_weights=weights)
        results.append(train(heads, features(), proposals(), targets())[0])
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
    "change, message",
    [
        ({"score_average": "max"}, "neither 'logits' nor 'probs'"),
        ({"soft_nms": "hard"}, "is 'hard'; it has to be one of"),
        ({"stage_loss_weights": [1.0]}, "3 box_heads, but 1 stage_loss_weights"),
        ({"mask_head": [nn.Identity()] * 2}, "3 box_heads, but 2 mask_head"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    arguments = {
        **cascade_from_config(default_config(), SHAPES)[0],
        "mask_head": [nn.Identity()] * 3,
    }
    with pytest.raises(UserError, match=message):
        MultiStageROIHeads(**{**arguments, **change})


def test_boxes_for_each_class_are_refused():
    cfg = default_config()
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
    with pytest.raises(UserError, match="CLS_AGNOSTIC_BBOX_REG True"):
        cascade_from_config(cfg, SHAPES)


def test_other_box_losses_than_smooth_l1_are_refused():
    cfg = default_config()
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = "giou"
    with pytest.raises(ValueError, match="BBOX_REG_LOSS_TYPE"):
        train(build_heads(cfg), features(), proposals(), targets())
