import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from d2ext.utils.testing import near_objects, random_batch, training_losses

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.projects.htc.helpers import make_model, pyramid

SWITCHES_OFF = (
    "HTC.INTERLEAVED",
    False,
    "HTC.MASK_INFO_FLOW",
    False,
    "HTC.SEMANTIC.ENABLED",
    False,
)


def copy_shared(target, source):
    """Weights of a model with other switches; what only one of them has stays as it is."""
    state = {k: v for k, v in source.state_dict().items() if k in target.state_dict()}
    target.load_state_dict(state, strict=False)
    return target


def zero(module):
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)


def stage_losses(model, pyramid, near_objects, **kwargs):
    batch = random_batch(**kwargs)
    heads = model.roi_heads.train()
    features = heads.region_features(pyramid(len(batch)))
    targets = [x["instances"] for x in batch]
    with EventStorage():
        return heads.losses(features, near_objects(batch), targets), features


def gradients(model, losses, names):
    model.zero_grad(set_to_none=True)
    sum(losses[n] for n in names).backward(retain_graph=True)
    return {
        name: None if p.grad is None else p.grad.abs().sum().item()
        for name, p in model.roi_heads.named_parameters()
    }


def reached(gradient, prefix):
    values = [v for name, v in gradient.items() if name.startswith(prefix)]
    assert values
    return [v is not None and v > 0 for v in values]


# ------------------------------------------------------------------------- information flow


def test_information_flow_with_zero_inlets_equals_no_flow():
    flow = make_model()
    for head in list(flow.roi_heads.mask_head)[1:]:
        zero(head.conv_res)
    plain = copy_shared(make_model("HTC.MASK_INFO_FLOW", False, seed=1), flow)
    batch = random_batch()
    a, b = training_losses(flow, batch), training_losses(plain, batch)
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    with torch.no_grad():
        a, b = flow.eval()(batch), plain.eval()(batch)
    assert len(a[0]["instances"]) == 10
    assert torch.equal(a[0]["instances"].pred_masks, b[0]["instances"].pred_masks)


def test_information_flow_changes_masks_and_their_parameters():
    flow = make_model()
    plain = copy_shared(make_model("HTC.MASK_INFO_FLOW", False, seed=1), flow)
    x = torch.randn(2, 8, 14, 14)
    assert not torch.allclose(flow.roi_heads.mask_logits(x, 1), plain.roi_heads.mask_logits(x, 1))
    extra = set(flow.state_dict()) - set(plain.state_dict())
    assert extra == {
        f"roi_heads.mask_head.{t}.conv_res.{kind}" for t in (1, 2) for kind in ("weight", "bias")
    }


def test_masks_of_a_stage_come_from_the_chain_of_all_heads_before_it():
    heads = make_model().roi_heads.eval()
    x = torch.randn(3, 8, 14, 14)
    first, second, third = heads.mask_head
    h1 = first.trunk(x)
    h2 = second.trunk(x + F.relu(F.conv2d(h1, second.conv_res.weight, second.conv_res.bias)))
    h3 = third.trunk(x + F.relu(F.conv2d(h2, third.conv_res.weight, third.conv_res.bias)))
    logits = [first.output(h1), second.output(h2), third.output(h3)]
    for stage in range(3):
        assert torch.allclose(heads.mask_logits(x, stage), logits[stage], atol=1e-5)
    classes = torch.tensor([0, 1, 2])
    each = [y[torch.arange(3), classes].sigmoid() for y in logits]
    assert torch.allclose(heads.mask_probabilities(x, classes, 3), sum(each) / 3, atol=1e-6)
    assert torch.allclose(heads.mask_probabilities(x, classes, 2), sum(each[:2]) / 2, atol=1e-6)
    heads.mask_ensemble = "last"
    assert torch.allclose(heads.mask_probabilities(x, classes, 3), each[2], atol=1e-6)


def test_equal_heads_without_inlet_predict_equal_masks():
    heads = make_model("HTC.MASK_INFO_FLOW", False).roi_heads
    for head in heads.mask_head:
        head.load_state_dict(heads.mask_head[0].state_dict())
    x, classes = torch.randn(3, 8, 14, 14), torch.tensor([2, 0, 1])
    single = heads.mask_logits(x, 0)
    assert torch.equal(single, heads.mask_logits(x, 2))
    expected = single[torch.arange(3), classes].sigmoid()
    assert torch.allclose(heads.mask_probabilities(x, classes, 3), expected, atol=1e-6)


def test_mask_loss_of_the_last_stage_reaches_all_trunks_but_no_other_output():
    model = make_model()
    losses, _ = stage_losses(model, pyramid, near_objects)
    gradient = gradients(model, losses, ["loss_mask_stage2"])
    for part in ("0.mask_fcn", "1.mask_fcn", "1.conv_res", "2.mask_fcn", "2.conv_res", "2.deconv"):
        assert all(reached(gradient, f"mask_head.{part}")), part
    assert any(reached(gradient, "mask_head.2.predictor"))
    assert any(reached(gradient, "semantic_head.conv_embedding"))
    for part in ("0.deconv", "0.predictor", "1.deconv", "1.predictor"):
        assert not any(reached(gradient, f"mask_head.{part}")), part
    assert not any(reached(gradient, "box_head") + reached(gradient, "box_predictor"))


# -------------------------------------------------------------------------- semantic fusion


def test_fusion_of_a_zero_embedding_equals_no_fusion():
    fused = make_model()
    zero(fused.roi_heads.semantic_head.conv_embedding)
    plain = copy_shared(make_model("HTC.SEMANTIC.FUSION", [], seed=1), fused)
    without = copy_shared(make_model("HTC.SEMANTIC.ENABLED", False, seed=2), fused)
    batch = random_batch()
    a, b = training_losses(fused, batch), training_losses(plain, batch)
    c = training_losses(without, batch)
    assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    assert set(a) - set(c) == {"loss_semantic_seg"}
    assert {k: v.item() for k, v in c.items()} == {k: a[k].item() for k in c}
    with torch.no_grad():
        results = [m.eval()(batch)[0]["instances"] for m in (fused, plain, without)]
    for other in results[1:]:
        assert torch.equal(results[0].scores, other.scores)
        assert torch.equal(results[0].pred_masks, other.pred_masks)


def test_semantic_features_are_pooled_fine_and_averaged_for_boxes():
    heads = make_model().roi_heads
    features = heads.region_features(pyramid(1))
    embedding = heads.semantic_head(features.pyramid)[1]
    boxes = torch.tensor([[5.0, 6, 40, 50], [2, 2, 90, 60], [30, 20, 33, 24]])
    semantic = roi_align(embedding, [boxes], 14, 1 / 8, -1, True)
    levels = [features.pyramid[f] for f in ("p2", "p3", "p4", "p5")]
    mask = heads.mask_pooler(levels, [Boxes(boxes)])
    box = heads.box_pooler(levels, [Boxes(boxes)])
    means = semantic.reshape(3, 8, 7, 2, 7, 2).mean(dim=(3, 5))
    ours = heads.pool_mask_features(features, [Boxes(boxes)])
    assert torch.allclose(ours, mask + semantic, atol=1e-6)
    ours = heads.pool_box_features(features, [Boxes(boxes)])
    assert torch.allclose(ours, box + means, atol=1e-6)


def test_half_precision_features_are_pooled_at_full_precision_boxes():
    heads = make_model().roi_heads
    features = heads.region_features(pyramid(1))
    half, single = (
        features._replace(
            pyramid={k: convert(v) for k, v in features.pyramid.items()},
            embedding=convert(features.embedding),
        )
        for convert in (lambda x: x.bfloat16(), lambda x: x.bfloat16().float())
    )
    boxes = [Boxes(torch.tensor([[33.3, 21.7, 61.3, 52.9]]))]  # no bfloat16 numbers
    for pool in (heads.pool_box_features, heads.pool_mask_features):
        assert torch.equal(pool(half, boxes).float(), pool(single, boxes))


@pytest.mark.parametrize("fusion", [["box"], ["mask"]])
def test_each_branch_can_go_without_semantic_features(fusion):
    heads = make_model("HTC.SEMANTIC.FUSION", fusion).roi_heads
    features = heads.region_features(pyramid(1))
    boxes = [Boxes(torch.tensor([[5.0, 6, 40, 50]]))]
    levels = [features.pyramid[f] for f in ("p2", "p3", "p4", "p5")]
    assert torch.equal(
        heads.pool_box_features(features, boxes), heads.box_pooler(levels, boxes)
    ) == ("box" not in fusion)
    assert torch.equal(
        heads.pool_mask_features(features, boxes), heads.mask_pooler(levels, boxes)
    ) == ("mask" not in fusion)


def test_box_losses_reach_the_embedding_but_not_the_mask_heads():
    model = make_model()
    losses, _ = stage_losses(model, pyramid, near_objects)
    names = [n for n in losses if "mask" not in n]
    assert len(names) == 6
    gradient = gradients(model, losses, names)
    assert all(reached(gradient, "semantic_head.conv_embedding"))
    assert all(reached(gradient, "semantic_head.lateral_convs"))
    assert not any(reached(gradient, "mask_head"))


# ------------------------------------------------------------------------------ interleaving


def identity_cascade(make_model, *overrides):
    """Zero deltas: every stage returns its boxes unmoved."""
    model = make_model(*overrides)
    for predictor in model.roi_heads.box_predictor:
        zero(predictor.bbox_pred)
    return model


def test_with_unmoved_boxes_interleaving_changes_nothing():
    on = identity_cascade(make_model)
    off = copy_shared(identity_cascade(make_model, "HTC.INTERLEAVED", False), on)
    a, _ = stage_losses(on, pyramid, near_objects)
    b, _ = stage_losses(off, pyramid, near_objects)
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5), name
        assert a[name].item() > 0 or "box_reg" in name


def test_with_moved_boxes_interleaving_changes_the_mask_losses_only():
    on = make_model()
    off = copy_shared(make_model("HTC.INTERLEAVED", False), on)
    a, _ = stage_losses(on, pyramid, near_objects)
    b, _ = stage_losses(off, pyramid, near_objects)
    for name in a:
        assert (a[name].item() == b[name].item()) == ("mask" not in name), name


def test_refined_boxes_are_sampled_anew_with_the_threshold_of_their_own_stage():
    heads = make_model().roi_heads
    calls = []
    for stage, sampler in enumerate(heads.samplers):

        def record(boxes, targets, tag, stage=stage, sampler=sampler):
            calls.append((stage, tag, [len(b) for b in boxes]))
            return sampler(boxes, targets, tag)

        heads.samplers[stage] = record
    batch = random_batch()
    features = heads.train().region_features(pyramid())
    with EventStorage():
        heads.losses(features, near_objects(batch), [x["instances"] for x in batch])
    # 12 proposals per image; the 3 objects join in every round and never go round with the others.
    assert calls == [
        (stage, f"stage{stage}_{branch}", [12, 12])
        for stage in range(3)
        for branch in ("box", "mask")
    ]


def test_masks_are_trained_on_positive_boxes_only():
    heads = make_model().roi_heads
    trained = []
    original = heads.pool_mask_features
    heads.pool_mask_features = lambda f, boxes: trained.append(boxes) or original(f, boxes)
    batch = random_batch()
    features = heads.train().region_features(pyramid())
    with EventStorage():
        heads.losses(features, near_objects(batch), [x["instances"] for x in batch])
    for image_boxes, x in zip(trained[0], batch):
        gts = x["instances"].gt_boxes
        assert torch.equal(image_boxes.tensor[:3], gts.tensor)  # the objects themselves come first
        assert len(image_boxes) < 15


# ---------------------------------------------------------------------------- empty inputs


@pytest.mark.parametrize("off", [(), SWITCHES_OFF])
@pytest.mark.parametrize("count, objects", [(0, 0), (0, 2), (5, 0), (5, 2)])
def test_every_parameter_gets_a_gradient_whatever_is_missing(off, count, objects):
    model = make_model(*off)
    heads = model.roi_heads.train()
    boxes = Boxes(torch.tensor([[3.0, 3, 30, 40]]).repeat(count, 1))
    proposals = [Instances((64, 96), proposal_boxes=boxes) for _ in range(2)]
    targets = [x["instances"] for x in random_batch(num_objects=objects)]
    labels = torch.full((2, 64, 96), 255)
    features = pyramid()
    with EventStorage():
        _, losses = heads(None, features, proposals, targets, labels)
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    levels = list(features) if heads.semantic_head is not None else ["p2", "p3", "p4", "p5"]
    assert all(features[f].grad is not None for f in levels)
    if not objects:
        assert all(v.item() == 0 for k, v in losses.items() if "box_reg" in k or "mask" in k)


def test_inference_without_proposals_returns_empty_results():
    heads = make_model().roi_heads.eval()
    proposals = [Instances((64, 96), proposal_boxes=Boxes(torch.zeros(0, 4)))] * 2
    results, _ = heads(None, pyramid(), proposals)
    assert [len(r) for r in results] == [0, 0]
    assert results[0].pred_masks.shape == (0, 1, 28, 28)


# --------------------------------------------------------------------------- given boxes


def test_given_boxes_get_the_masks_of_the_full_result():
    heads = make_model().roi_heads.eval()
    features, proposals = pyramid(), near_objects(random_batch())
    with torch.no_grad():
        results, _ = heads(None, features, proposals)
        bare = [
            Instances(r.image_size, pred_boxes=r.pred_boxes, pred_classes=r.pred_classes)
            for r in results
        ]
        again = heads.forward_with_given_boxes(features, bare)
    for a, b in zip(results, again):
        assert torch.equal(a.pred_masks, b.pred_masks)
        assert a.pred_masks.shape == (len(a), 1, 28, 28)
        assert 0 <= a.pred_masks.min() and a.pred_masks.max() <= 1


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("HTC.MASK_ENSEMBLE", "max", "neither 'mean' nor 'last'"),
        ("HTC.SEMANTIC.FUSION", ["keypoint"], "only 'box' and 'mask' exist"),
        ("HTC.STAGE_LOSS_WEIGHTS", [1.0, 1.0], "2 stage_loss_weights"),
        ("MASK_ON", False, "MODEL.MASK_ON True"),
    ],
)
def test_impossible_settings_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        make_model(key, value)


def test_mask_heads_that_do_not_fit_the_flow_are_refused():
    heads = make_model().roi_heads
    with pytest.raises(ValueError, match="information_flow="):
        type(heads)(
            num_classes=3,
            box_in_features=heads.box_in_features,
            box_pooler=heads.box_pooler,
            box_heads=heads.box_head,
            box_predictors=heads.box_predictor,
            samplers=heads.samplers,
            mask_in_features=heads.mask_in_features,
            mask_pooler=heads.mask_pooler,
            mask_head=list(heads.mask_head),
            mask_info_flow=False,
        )
