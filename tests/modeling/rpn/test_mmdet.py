import pytest
import torch

from d2ext.errors import UserError
from d2ext.modeling import InsideAnchorRPN
from d2ext.modeling.regions.sampling import image_seeds
from d2ext.modeling.rpn.mmdet import nms_by_level
from d2ext.utils.testing import tiny_config

from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
SIZE = (64, 96)


def config(name="InsideAnchorRPN"):
    cfg = tiny_config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = name
    cfg.MODEL.RPN.SMOOTH_L1_BETA = 0.1111
    return cfg


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, 8, SIZE[0] // s.stride, SIZE[1] // s.stride, generator=generator)
        for name, s in SHAPES.items()
    }


@pytest.fixture
def targets():
    # One at the border, one smaller than any anchor, two that collide.
    boxes = [[0.0, 0, 30, 22], [50, 30, 54, 34], [40, 20, 62, 42], [42, 22, 64, 44]]
    one = Instances(
        SIZE, gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor([0, 1, 2, 0])
    )
    none = Instances(SIZE, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    return [one, none]


def run(rpn, features, targets):
    images = ImageList(torch.zeros(2, 3, *SIZE), [SIZE, SIZE])
    with EventStorage():
        return rpn(images, features, targets)


def labels_by_loops(anchors, gts, size, low_quality_iou):
    """Labels and ground-truth rows before sampling, anchor by anchor."""
    labels, rows = {}, {}
    inside = [
        i
        for i, (x1, y1, x2, y2) in enumerate(anchors.tolist())
        if x1 >= 0 and y1 >= 0 and x2 < size[1] and y2 < size[0]
    ]
    iou = pairwise_iou(Boxes(gts), Boxes(anchors))
    for i in inside:
        best = iou[:, i].max()
        labels[i] = 1 if best >= 0.7 else 0 if best < 0.3 else -1
        rows[i] = int(iou[:, i].argmax())
    for g in range(len(gts)):
        best = max(iou[g, i] for i in inside)
        if best >= low_quality_iou:
            for i in inside:
                if iou[g, i] == best:
                    labels[i], rows[i] = 1, g
    return labels, rows


def test_labels_follow_the_rules_of_mmdetection(features, targets):
    cfg = config()
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 100000  # every candidate is sampled
    rpn = build_proposal_generator(cfg, SHAPES)
    anchors = rpn.anchor_generator([features[f] for f in rpn.in_features])
    (labels, _), (matched, _) = rpn.label_and_sample_anchors(anchors, targets)
    gts = targets[0].gt_boxes.tensor
    expected, rows = labels_by_loops(Boxes.cat(anchors).tensor, gts, SIZE, 0.3)
    assert {i: int(labels[i]) for i in expected} == expected
    assert (labels >= 0).sum() == sum(v >= 0 for v in expected.values())
    positives = [i for i, v in expected.items() if v == 1]
    assert {rows[i] for i in positives} == {0, 2, 3}  # the tiny object stays below the floor
    for i in positives:
        assert torch.equal(matched[i], gts[rows[i]])


def test_an_object_at_the_border_finds_the_best_of_the_anchors_inside():
    gt = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[0.0, 0, 30, 22]])))
    anchors = Boxes(torch.tensor([[-2.0, 0, 30, 22], [15.0, 0, 30, 22]]))  # IoU 0.94 and 0.5
    rpn = build_proposal_generator(config(), SHAPES)
    assert rpn.label_anchors(anchors, gt)[0].tolist() == [-1, 1]


def test_sampling_respects_size_and_share_of_positives(features, targets):
    cfg = config()
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 4
    rpn = build_proposal_generator(cfg, SHAPES)
    anchors = rpn.anchor_generator([features[f] for f in rpn.in_features])
    with image_seeds([{"sample_seed": 1}, {"sample_seed": 2}]):
        labels, _ = rpn.label_and_sample_anchors(anchors, targets)
        again, _ = rpn.label_and_sample_anchors(anchors, targets)
    assert (labels[0] == 1).sum() == 2 and (labels[0] == 0).sum() == 2
    assert (labels[1] == 1).sum() == 0 and (labels[1] == 0).sum() == 4
    assert all(torch.equal(a, b) for a, b in zip(labels, again))


def test_losses_are_divided_by_the_anchors_sampled(features, targets):
    cfg = config()
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 100000
    torch.manual_seed(0)
    rpn = build_proposal_generator(cfg, SHAPES)
    torch.nn.init.normal_(rpn.rpn_head.objectness_logits.weight)
    torch.nn.init.normal_(rpn.rpn_head.anchor_deltas.weight)
    _, losses = run(rpn, features, targets)

    maps = [features[f] for f in rpn.in_features]
    anchors = Boxes.cat(rpn.anchor_generator(maps)).tensor
    logits, deltas = rpn.rpn_head(maps)
    logits = torch.cat([x.permute(0, 2, 3, 1).reshape(2, -1) for x in logits], dim=1)
    deltas = torch.cat(
        [
            x.reshape(2, 3, 4, *x.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 4)
            for x in deltas
        ],
        dim=1,
    )
    gts = targets[0].gt_boxes.tensor
    labels, rows = labels_by_loops(anchors, gts, SIZE, 0.3)
    cls, box, count = 0.0, 0.0, 0
    for i, label in labels.items():
        p = logits[0, i].sigmoid()
        if label >= 0:
            cls, count = cls - (p.log() if label else (1 - p).log()), count + 1
        if label == 1:
            (ax, ay), (gx, gy) = ((b[:2] + b[2:]) / 2 for b in (anchors[i], gts[rows[i]]))
            (aw, ah), (gw, gh) = (b[2:] - b[:2] for b in (anchors[i], gts[rows[i]]))
            target = torch.stack([(gx - ax) / aw, (gy - ay) / ah, (gw / aw).log(), (gh / ah).log()])
            error = (deltas[0, i] - target).abs()
            quadratic = 0.5 * error**2 / 0.1111
            box = box + torch.where(error < 0.1111, quadratic, error - 0.5 * 0.1111).sum()
        cls, count = cls - (1 - logits[1, i].sigmoid()).log(), count + 1
    assert losses["loss_rpn_cls"].item() == pytest.approx((cls / count).item(), rel=1e-4)
    assert losses["loss_rpn_loc"].item() == pytest.approx((box / count).item(), rel=1e-4)


class WithDetectron2Rules(InsideAnchorRPN):
    """All anchors, detectron2's matches; the losses are still divided by the anchors sampled."""

    def inside(self, anchors, image_size):
        return torch.ones(len(anchors), dtype=torch.bool)

    def match(self, iou):
        return Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)(iou)


def test_without_its_rules_it_equals_detectron2(features, targets):
    ours = WithDetectron2Rules(config(), SHAPES)
    ours.box2box_transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    theirs = build_proposal_generator(config("RPN"), SHAPES)
    theirs.load_state_dict(ours.state_dict())
    for rpn in (ours, theirs):
        rpn.batch_size_per_image = 8000  # all candidates, so that the draws do not matter
        rpn.positive_fraction = 0.5
    anchors = ours.anchor_generator([features[f] for f in ours.in_features])
    sampled = sum((x >= 0).sum().item() for x in ours.label_and_sample_anchors(anchors, targets)[0])
    proposals, losses = run(ours, features, targets)
    expected_proposals, expected = run(theirs, features, targets)
    assert losses.keys() == expected.keys()
    for name in losses:
        value = losses[name].item() * sampled / (2 * 8000)
        assert value == pytest.approx(expected[name].item(), rel=1e-6)
    for a, b in zip(proposals, expected_proposals):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)


@pytest.mark.parametrize("min_size", [0.0, 12.0])
def test_training_proposals_are_those_of_detectron2(features, min_size):
    ours, theirs = (build_proposal_generator(config(n), SHAPES) for n in ("InsideAnchorRPN", "RPN"))
    theirs.load_state_dict(ours.state_dict())
    proposals = []
    # No two scores are equal: which of two detectron2 takes first is not the same in its versions.
    tall = {name: x.repeat(1, 1, 3, 1) for name, x in features.items()}
    tall = {name: x * torch.linspace(1, 2, x.shape[2])[:, None] for name, x in tall.items()}
    for rpn in (ours, theirs):
        torch.nn.init.constant_(rpn.rpn_head.anchor_deltas.bias, 0.3)
        # So many that detectron2 suppresses level by level, too.
        rpn.pre_nms_topk, rpn.post_nms_topk, rpn.nms_thresh = {True: 2000}, {True: 300}, 0.5
        rpn.min_box_size = min_size
        maps = [torch.cat([tall[f]] * 2) for f in rpn.in_features]
        anchors = rpn.anchor_generator(maps)
        logits, deltas = rpn.rpn_head(maps)
        logits = [100 * x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas]
        sizes = [(192, 96), (150, 96), (192, 50), (90, 90)]
        proposals.append(rpn.train().predict_proposals(anchors, logits, deltas, sizes))
    for a, b in zip(*proposals, strict=True):
        assert a.image_size == b.image_size and 20 < len(a) <= 300
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)


def test_diverged_proposals_stop_the_training(features, targets):
    rpn = build_proposal_generator(config(), SHAPES)
    torch.nn.init.constant_(rpn.rpn_head.anchor_deltas.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        run(rpn, features, targets)


def test_another_box_loss_is_that_of_detectron2(features, targets):
    rpn = build_proposal_generator(config(), SHAPES)
    rpn.batch_size_per_image = 100000
    _, smooth = run(rpn, features, targets)
    rpn.box_reg_loss_type = "giou"
    _, giou = run(rpn, features, targets)
    assert smooth["loss_rpn_cls"].item() == pytest.approx(giou["loss_rpn_cls"].item(), rel=1e-6)
    assert 0 < giou["loss_rpn_loc"].item() != smooth["loss_rpn_loc"].item()


def test_levels_do_not_suppress_each_other():
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 30, (60, 2), generator=generator).float()
    boxes, scores = torch.cat([corners, corners + 20], 1), torch.rand(60, generator=generator)
    levels = [40, 0, 20]
    level = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(levels))
    found = nms_by_level(boxes, scores, levels, 0.5)
    assert torch.equal(found, batched_nms(boxes, scores, level, 0.5))
    assert len(found) > len(nms_by_level(boxes, scores, [60], 0.5))


def test_images_without_objects_give_a_zero_box_loss_connected_to_the_head(features, targets):
    rpn = build_proposal_generator(config(), SHAPES)
    _, losses = run(rpn, features, [targets[1], targets[1]])
    assert losses["loss_rpn_loc"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in rpn.parameters())


def test_images_smaller_than_every_anchor_give_finite_losses():
    rpn = build_proposal_generator(config(), SHAPES)
    features = {f: torch.randn(2, 8, 1, 1) for f in SHAPES}
    gt = Instances((4, 4), gt_boxes=Boxes(torch.tensor([[0.0, 0, 3, 3]])))
    images = ImageList(torch.zeros(2, 3, 4, 4), [(4, 4), (4, 4)])
    with EventStorage():
        _, losses = rpn(images, features, [gt, gt])
    assert [loss.item() for loss in losses.values()] == [0, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)},
            "InsideAnchorRPN: give anchor_matcher allow_low_quality_matches=False",
        ),
        ({"anchor_boundary_thresh": 0.0}, "leave MODEL.RPN.BOUNDARY_THRESH at -1"),
    ],
)
def test_rules_of_detectron2_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        InsideAnchorRPN(config(), SHAPES, **changes)
