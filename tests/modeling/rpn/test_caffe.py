import json
import math
from pathlib import Path

import pytest
import torch

from d2ext.errors import UserError
from d2ext.modeling import CaffeRPN, ClampedBox2BoxTransform, RoundedAnchorGenerator
from d2ext.modeling.regions.boxes import to_continuous, to_inclusive
from d2ext.modeling.regions.sampling import image_seeds
from d2ext.utils.testing import tiny_config

from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead, build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "fcis_vectors.json"
SIZE = (70, 100)  # not a multiple of the stride


def make_rpn(seed=0, **arguments):
    torch.manual_seed(seed)
    arguments = {
        "in_features": ["res4"],
        "head": StandardRPNHead(in_channels=8, num_anchors=6, conv_dims=[8]),
        "anchor_generator": RoundedAnchorGenerator(
            sizes=[[16, 32]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16], offset=0.5
        ),
        "anchor_matcher": Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=False),
        "box2box_transform": ClampedBox2BoxTransform([1.0] * 4, scale_clamp=math.inf),
        "batch_size_per_image": 10000,
        "positive_fraction": 0.5,
        "pre_nms_topk": (60, 60),
        "post_nms_topk": (30, 30),
        "nms_thresh": 0.7,
        "smooth_l1_beta": 1 / 9,
        **arguments,
    }
    rpn = CaffeRPN(**arguments)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return rpn


def make_features(images=1, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    grid = [-(-n // 16) for n in size]
    return {"res4": torch.randn(images, 8, *grid, generator=generator)}


def make_images(*sizes):
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    return ImageList(torch.zeros(len(sizes), 3, height, width), list(sizes))


def make_targets(*boxes, size=SIZE):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes)).long())


def run(rpn, images, features, targets=None):
    rpn.train(targets is not None)
    with EventStorage():
        return rpn(images, features, targets)


# ------------------------------------------------------------------------------------- labels


def labels_by_loops(anchors, gts, size, zero_overlap=True):
    """The release's rule, anchor by anchor, on first and last pixels."""
    height, width = size
    pixels = to_inclusive(anchors).tolist()
    inside = [
        i
        for i, (x1, y1, x2, y2) in enumerate(pixels)
        if x1 >= 0 and y1 >= 0 and x2 < width and y2 < height
    ]
    iou = pairwise_iou(Boxes(gts), Boxes(anchors))
    labels, rows = {}, {}
    for i in inside:
        best = float(iou[:, i].max())
        labels[i], rows[i] = (
            (1 if best >= 0.7 else 0 if best < 0.3 else -1),
            int(iou[:, i].argmax()),
        )
    for overlaps in iou:
        best = max(float(overlaps[i]) for i in inside)
        if best > 0 or zero_overlap:
            labels.update({i: 1 for i in inside if float(overlaps[i]) == best})
    return labels, rows


OBJECTS = ([0.0, 0, 17, 15], [40, 20, 70, 50], [44, 24, 74, 50], [88, 54, 100, 70])


@pytest.mark.parametrize("zero_overlap", [True, False])
@pytest.mark.parametrize("hidden", [(), ([98.0, 68, 100, 70],)])
def test_labels_follow_the_rules_of_the_release(zero_overlap, hidden):
    # No anchor inside the image reaches the hidden object in the corner.
    rpn = make_rpn(match_zero_overlap=zero_overlap)
    targets = make_targets(*OBJECTS, *hidden)
    anchors = rpn.anchor_generator([make_features()["res4"]])
    (labels,), (matched,) = rpn.label_and_sample_anchors(anchors, [targets])
    gts = targets.gt_boxes.tensor
    expected, rows = labels_by_loops(anchors[0].tensor, gts, SIZE, zero_overlap)
    if not zero_overlap or not hidden:
        assert {i: int(labels[i]) for i in expected} == expected
    else:  # more positives than may be sampled: all those drawn are among them
        assert sum(v == 1 for v in expected.values()) > 20
        assert all(expected[i] == 1 for i in (labels == 1).nonzero().flatten().tolist())
    assert (labels >= 0).sum() <= sum(v >= 0 for v in expected.values())
    for i in (labels == 1).nonzero().flatten().tolist():
        assert torch.equal(matched[i], gts[rows[i]])


def test_an_anchor_that_touches_the_lower_right_border_takes_part():
    rpn = make_rpn()
    image = (48, 64)
    anchors = Boxes(torch.tensor([[48.0, 32, 64, 48], [48, 32, 65, 48], [-1, 0, 16, 16]]))
    gt = make_targets([48.0, 32, 64, 48], size=image)
    assert rpn.label_anchors(anchors, gt)[0].tolist() == [1, -1, -1]
    assert not anchors.inside_box(image, 0)[0]  # detectron2's rule


def test_positives_win_where_a_best_anchor_overlaps_little():
    rpn = make_rpn()
    anchors = Boxes(torch.tensor([[0.0, 0, 16, 16], [32, 0, 48, 16]]))
    gt = make_targets([12.0, 12, 20, 20])
    assert rpn.label_anchors(anchors, gt)[0].tolist() == [1, 0]


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("by_sampled", [False, True])
def test_losses_are_means_per_image(by_sampled):
    rpn = make_rpn(normalize_box_by_sampled=by_sampled, batch_size_per_image=300)
    features = make_features(2)
    targets = [make_targets(*OBJECTS), make_targets([30.0, 10, 62, 40])]
    _, losses = run(rpn, make_images(SIZE, SIZE), features, targets)
    maps = features["res4"]
    anchors = rpn.anchor_generator([maps])[0].tensor
    logits, deltas = (x[0] for x in rpn.rpn_head([maps]))
    logits = logits.permute(0, 2, 3, 1).reshape(2, -1)
    deltas = deltas.reshape(2, 6, 4, *maps.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 4)
    cls, box = 0.0, 0.0
    for image, target in enumerate(targets):
        gts = target.gt_boxes.tensor
        labels, rows = labels_by_loops(anchors, gts, SIZE)
        sampled = {i: v for i, v in labels.items() if v >= 0}
        image_cls, image_box = 0.0, 0.0
        for i, label in sampled.items():
            p = logits[image, i].sigmoid()
            image_cls = image_cls - (p if label else 1 - p).log()
            if label == 1:
                (ax, ay), (gx, gy) = ((b[:2] + b[2:]) / 2 for b in (anchors[i], gts[rows[i]]))
                (aw, ah), (gw, gh) = (b[2:] - b[:2] for b in (anchors[i], gts[rows[i]]))
                goal = [(gx - ax) / aw, (gy - ay) / ah, (gw / aw).log(), (gh / ah).log()]
                error = (deltas[image, i] - torch.stack(goal)).abs()
                parts = torch.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18)
                image_box = image_box + parts.sum()
        cls = cls + image_cls / len(sampled) / 2
        box = box + image_box / (len(sampled) if by_sampled else 300) / 2
    assert losses["loss_rpn_cls"].item() == pytest.approx(cls.item(), rel=1e-4)
    assert losses["loss_rpn_loc"].item() == pytest.approx(box.item(), rel=1e-4)


def test_a_batch_is_the_mean_of_its_images():
    rpn = make_rpn(batch_size_per_image=20)
    sizes = [(70, 100), (50, 60)]
    features = make_features(2)
    targets = [make_targets(*OBJECTS), make_targets([30.0, 10, 50, 40], size=sizes[1])]
    with image_seeds([{"sample_seed": 1}, {"sample_seed": 2}]):
        proposals, losses = run(rpn, make_images(*sizes), features, targets)
    total = {"loss_rpn_cls": 0.0, "loss_rpn_loc": 0.0}
    for i, size in enumerate(sizes):
        alone = {"res4": features["res4"][i : i + 1]}
        with image_seeds([{"sample_seed": i + 1}]):
            (single,), own = run(rpn, make_images(size), alone, targets[i : i + 1])
        torch.testing.assert_close(
            single.proposal_boxes.tensor, proposals[i].proposal_boxes.tensor, rtol=0, atol=1e-3
        )
        total = {name: value + own[name].item() / 2 for name, value in total.items()}
    for name, value in total.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("size", [SIZE, (4, 4)])
def test_without_objects_losses_are_finite_and_connected(size):
    rpn = make_rpn()
    none = Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    _, losses = run(rpn, make_images(size), make_features(size=size), [none])
    assert losses["loss_rpn_loc"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())


# ---------------------------------------------------------------------------------- proposals


class FixedHead(torch.nn.Module):
    """Gives constant maps."""

    def __init__(self, logits, deltas):
        super().__init__()
        self.maps = [logits], [deltas]

    def forward(self, features):
        return self.maps


def test_proposals_equal_those_of_the_release():
    vector = {v["id"]: v for v in json.loads(VECTORS.read_text())["vectors"]}["rpn_26_decode_order"]
    inputs, expected = vector["inputs"], vector["expected"]
    scores, deltas = torch.tensor(inputs["cls_score_chw"]), torch.tensor(inputs["bbox_pred_chw"])
    head = FixedHead((scores[2:] - scores[:2])[None], deltas[None])  # two-way softmax = sigmoid
    rpn = make_rpn(head=head, nms_thresh=1.0)
    base = to_continuous(torch.tensor(inputs["base_anchors"]))
    rpn.anchor_generator = RoundedAnchorGenerator(
        sizes=[[16, 32]], aspect_ratios=[[1.0]], strides=[16], offset=0.0
    )
    rpn.anchor_generator.cell_anchors._buffers["0"] = base
    size = (inputs["im_h"], inputs["im_w"])
    proposals, losses = run(rpn, make_images(size), {"res4": torch.zeros(1, 8, 1, 2)})
    assert losses == {}
    order, rows = expected["order_by_score"], torch.tensor(expected["rows"])
    assert proposals[0].anchor_index.tolist() == order
    torch.testing.assert_close(proposals[0].objectness_logits.sigmoid(), rows[order, 0])
    torch.testing.assert_close(
        to_inclusive(proposals[0].proposal_boxes.tensor), rows[order, 1:], rtol=0, atol=1e-5
    )


def proposals_by_loops(rpn, features, size, min_size):
    """Decode, clip, filter, sort and suppress, one box after the other."""
    maps = features["res4"]
    anchors = to_inclusive(rpn.anchor_generator([maps])[0].tensor)
    logits, deltas = (x[0][0].detach() for x in rpn.rpn_head([maps]))
    columns = maps.shape[-1]
    found = []
    for y in range(size[0] // 16):
        for x in range(size[1] // 16):
            for a in range(6):
                ax1, ay1, ax2, ay2 = anchors[(y * columns + x) * 6 + a].tolist()
                aw, ah = ax2 - ax1 + 1, ay2 - ay1 + 1
                dx, dy, dw, dh = deltas[4 * a : 4 * a + 4, y, x].tolist()
                cx, cy = ax1 + 0.5 * (aw - 1) + dx * aw, ay1 + 0.5 * (ah - 1) + dy * ah
                w, h = aw * math.exp(dw), ah * math.exp(dh)
                box = [
                    cx - 0.5 * (w - 1),
                    cy - 0.5 * (h - 1),
                    cx + 0.5 * (w - 1),
                    cy + 0.5 * (h - 1),
                ]
                box = [min(max(v, 0), size[(i + 1) % 2] - 1) for i, v in enumerate(box)]
                if box[2] - box[0] + 1 >= min_size and box[3] - box[1] + 1 >= min_size:
                    found.append((float(logits[a, y, x]), box))
    found.sort(key=lambda item: -item[0])
    kept = []
    for _, box in found[:60]:
        one = Boxes(to_continuous(torch.tensor([box])))
        others = Boxes(to_continuous(torch.tensor(kept).reshape(-1, 4)))
        if not (pairwise_iou(one, others) > 0.7).any():
            kept.append(box)
    return kept[:30]


@pytest.mark.parametrize("min_size", [12, 18])
def test_proposals_equal_a_transcription(min_size):
    rpn = make_rpn(min_box_size=min_size)
    features = make_features()
    (proposals,), _ = run(rpn, make_images(SIZE), features)
    expected = proposals_by_loops(rpn, features, SIZE, min_size)
    ours = to_inclusive(proposals.proposal_boxes.tensor)
    assert len(expected) > 5
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-3)
    assert (proposals.objectness_logits.diff() <= 0).all()


def test_a_box_of_the_minimum_size_is_kept():
    rpn = make_rpn(min_box_size=16.0).eval()
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 20, 15.9, 40], [40, 0, 80, 15.9]])
    assert rpn.select(boxes, torch.tensor([0.0, 1.0, 2.0]), 16.0).tolist() == [0]
    assert rpn.select(boxes, torch.tensor([0.0, 1.0, 2.0]), 10.0).tolist() == [2, 1, 0]


def test_small_boxes_do_not_take_the_places_of_the_best():
    rpn = make_rpn(pre_nms_topk=(1, 1)).eval()
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 20, 40, 40]])
    assert rpn.select(boxes, torch.tensor([9.0, 1.0]), 16.0).tolist() == [1]


def test_growth_is_unlimited_unless_clamped():
    anchors, size = torch.tensor([[40.0, 30, 56, 46]]), (10**6, 10**6)
    deltas = torch.tensor([[0.0, 0.0, 8.0, 1.0]])
    width = (lambda b: float(b[0, 2] - b[0, 0]))(make_rpn().decode(anchors, deltas, size))
    assert width == pytest.approx(48 + 8 * math.exp(8), rel=1e-4)  # the left half is clipped
    clamped = make_rpn(box2box_transform=ClampedBox2BoxTransform([1.0] * 4))
    width = (lambda b: float(b[0, 2] - b[0, 0]))(clamped.decode(anchors, deltas, size))
    assert width == pytest.approx(48 + 8 * 1000 / 16, rel=1e-4)
    everything = make_rpn().decode(anchors, torch.tensor([[0.0, 0, 1000, 1000]]), (50, 60))
    assert everything.tolist() == [[0, 0, 60, 50]]


def test_diverged_boxes_stop_the_training_and_are_left_out_of_inference():
    rpn = make_rpn()
    boxes = torch.tensor([[float("nan"), 0, 16, 16], [0, 0, 16, 16]])
    with pytest.raises(FloatingPointError, match="diverged"):
        rpn.train().select(boxes, torch.zeros(2), 1.0)
    assert rpn.eval().select(boxes, torch.zeros(2), 1.0).tolist() == [1]


def test_proposals_are_constants():
    rpn = make_rpn()
    (proposals,), _ = run(rpn, make_images(SIZE), make_features(), [make_targets(*OBJECTS)])
    assert not proposals.proposal_boxes.tensor.requires_grad
    assert not proposals.objectness_logits.requires_grad


# ------------------------------------------------------------------------------------- config


def test_yaml_config_builds_the_same_network():
    cfg = tiny_config()
    model = cfg.MODEL
    model.PROPOSAL_GENERATOR.NAME = "CaffeRPN"
    model.PROPOSAL_GENERATOR.MIN_SIZE = 4
    model.ANCHOR_GENERATOR.NAME = "RoundedAnchorGenerator"
    model.ANCHOR_GENERATOR.SIZES = [[16, 32]]
    model.ANCHOR_GENERATOR.OFFSET = 0.5
    model.RPN.IN_FEATURES = ["res4"]
    model.RPN.CONV_DIMS = [8]
    model.RPN.SMOOTH_L1_BETA = 1 / 9
    yaml = build_proposal_generator(cfg, {"res4": ShapeSpec(channels=8, stride=16)})
    lazy = make_rpn(min_box_size=4.0, batch_size_per_image=256)
    lazy.load_state_dict(yaml.state_dict())
    results = []
    for rpn in (yaml, lazy):
        with image_seeds([{"sample_seed": 5}]):
            targets = [make_targets(*OBJECTS)]
            results.append(run(rpn, make_images(SIZE), make_features(), targets))
    ((first,), losses), ((second,), others) = results
    assert len(first) == len(second) > 0
    torch.testing.assert_close(first.proposal_boxes.tensor, second.proposal_boxes.tensor)
    torch.testing.assert_close(losses, others)


def test_impossible_arguments_are_refused():
    with pytest.raises(UserError, match="one feature map"):
        make_rpn(in_features=["p2", "p3"])
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    with pytest.raises(UserError, match="allow_low_quality_matches=False"):
        make_rpn(anchor_matcher=matcher)
