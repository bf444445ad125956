"""Numbers worked out for MNC, met by the code that the network runs.

The vectors name first and last pixels of a box and put background first; here boxes are continuous
and background is last.
"""

import pytest
import torch

from d2ext.config import get_config
from d2ext.modeling import VGG16, RoundedAnchorGenerator
from d2ext.modeling.regions.boxes import to_continuous, to_inclusive
from d2ext.modeling.rpn.caffe import AnchorPredictions
from d2ext.projects.mnc import InstanceVoting, MNCBoxTransform, MNCSampler
from d2ext.projects.mnc.box_transform import exact_boxes
from d2ext.projects.mnc.losses import box_loss, mask_loss
from d2ext.projects.mnc.stage_bridge import bridge_boxes
from d2ext.projects.mnc.targets import mask_ious, mask_level_classes
from d2ext.utils.testing import as_double as double
from d2ext.utils.testing import assert_numbers as close

from detectron2.config import instantiate
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling.anchor_generator import BufferList
from detectron2.structures import Boxes, Instances

from tests.projects.mnc.helpers import make_model

DOUBLE = torch.float64
STDS = (0.1, 0.1, 0.2, 0.2)
# Tested where they are computed: with operators, mask targets, evaluators, importers.
OPERATORS = {*(f"RW{i}" for i in range(1, 10)), *(f"RB{i}" for i in range(1, 5))}
OPERATORS |= {"MR1", "MR2", "MR3", "MP1"}
ELSEWHERE = {*OPERATORS, "MT1", "EV1", "EV2", "IM1"}
HERE = {"LS1", "LS2", "BX1", "BX2", "BX3", "MT2", "ML1", "SB1", "SB2", "PB1", "SA1", "SC1"}
HERE |= {"MV1", "MV2", "MV3"}


def test_every_vector_is_tested(vectors):
    assert set(vectors) == HERE | ELSEWHERE


# -------------------------------------------------------------------------------------- the gate


def test_only_boxes_with_a_class_at_the_mask_level_send_gradient_into_their_masks(vectors):
    inputs = vectors["ML1"]["inputs"]
    probabilities = double(inputs["sigmoid"])
    logits = probabilities.logit().requires_grad_()
    classes = torch.tensor([x - 1 if x else 3 for x in inputs["mask_label"]])
    gate = make_model().roi_heads.gate(logits.sigmoid()[:, None, None], classes)
    gradient = double(inputs["grad_mask"])[:, None, None]
    close(torch.autograd.grad(gate, logits, gradient)[0], vectors["ML1"]["expected"]["grad_logits"])


def test_mask_level_class_needs_half_of_the_whole_mask(vectors):
    inputs, expected = vectors["MT2"]["inputs"], vectors["MT2"]["expected"]
    x1, y1, x2, y2 = inputs["gt_box"]
    mask = torch.zeros(1, 12, 12, dtype=torch.bool)
    mask[0, y1 : y2 + 1, x1 : x2 + 1] = torch.tensor(inputs["gt_mask"], dtype=torch.bool)
    box = to_continuous(torch.tensor([inputs["roi"]], dtype=torch.float32))
    predicted = torch.tensor([inputs["pred_mask"]])
    row = torch.tensor([0])
    assert float(mask_ious(predicted, box, mask, row)) == pytest.approx(expected["mask_iou"])

    sample = Instances(
        (12, 12),
        proposal_boxes=Boxes(box),
        foreground=torch.tensor([True]),
        gt_classes=torch.tensor([inputs["gt_class"] - 1]),
        gt_index=row,
    )
    arguments = (predicted[:, None], [sample], [mask], 20, 0.4)
    assert mask_level_classes(*arguments, 0.5).tolist() == [expected["label"] - 1]
    assert mask_level_classes(*arguments, expected["mask_iou"] + 0.01).tolist() == [20]


# ---------------------------------------------------------------------------------------- losses


def test_mask_loss_counts_the_pixels_of_foreground_boxes(vectors):
    inputs, expected = vectors["LS1"]["inputs"], vectors["LS1"]["expected"]
    logits = double(inputs["logits"])[:, None, None].requires_grad_()
    foreground = double(inputs["weight"])[:, 0] > 0
    targets = double(inputs["target"])[foreground, None] > 0
    image = torch.zeros(len(logits), dtype=torch.int64)
    loss = mask_loss(logits, targets, foreground, image, 1)
    close(loss, expected["loss"])
    close(torch.autograd.grad(loss, logits)[0], expected["grad"])
    weight = make_model().roi_heads.mask_loss_weight
    assert float(loss.detach()) * weight == pytest.approx(expected["loss_times_2"], abs=1e-5)


def test_smooth_l1_of_boxes_and_of_anchors(vectors):
    inputs, expected = vectors["LS2"]["inputs"], vectors["LS2"]["expected"]
    model = make_model()
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=DOUBLE)
    image, rows = torch.tensor([0]), torch.tensor([1])
    for beta, key in (
        (model.roi_heads.smooth_l1_beta, "sigma1"),
        (model.proposal_generator.smooth_l1_beta, "sigma3"),
    ):
        deltas = double(inputs["diff"])[None].requires_grad_()
        loss = box_loss(deltas, box, box, image, MNCBoxTransform([1.0] * 4), beta, image, rows)
        close(loss, sum(expected[key]))
        close(torch.autograd.grad(loss, deltas)[0], expected[f"{key}_grad"])


# ----------------------------------------------------------------------- boxes, anchors, samples


def test_box_deltas_and_the_growth_of_the_released_decoder(vectors):
    inputs, expected = vectors["BX1"]["inputs"], vectors["BX1"]["expected"]
    box, target = (to_continuous(double([inputs[key]])) for key in ("ex", "gt"))
    plain = MNCBoxTransform([1.0, 1.0, 1.0, 1.0])
    deltas = plain.get_deltas(box, target)
    close(deltas, expected["delta"])
    weighted = MNCBoxTransform([1 / s for s in STDS])
    close(weighted.get_deltas(box, target), expected["normalised"])
    close(plain.apply_deltas(deltas, box), target[0].tolist())
    # The vector reads what is decoded as first and last pixel.
    legacy = MNCBoxTransform([1.0, 1.0, 1.0, 1.0], plus_one=True)
    close(to_inclusive(legacy.apply_deltas(deltas, box)), expected["decode_of_delta"])
    close(to_inclusive(legacy.apply_deltas(0 * deltas, box)), expected["decode_of_zero"])


def test_anchors_of_the_released_network(vectors):
    rpn = get_config("../projects/MNC/configs/mnc_vgg16_voc_sds.py").model.proposal_generator
    generator = instantiate(rpn.anchor_generator)
    assert isinstance(generator, RoundedAnchorGenerator)
    assert isinstance(generator.cell_anchors, BufferList)
    anchors = generator([torch.zeros(1, 1, 1, 2)])[0].tensor
    close(to_inclusive(anchors[:9]), vectors["BX2"]["expected"]["anchors"])
    close(anchors[9:] - anchors[:9], [[16.0, 0.0, 16.0, 0.0]] * 9)


def test_suppression_is_strict(vectors):
    inputs, expected = vectors["BX3"]["inputs"], vectors["BX3"]["expected"]
    rpn = make_model().eval().proposal_generator
    boxes = to_continuous(torch.tensor(inputs["boxes"]))
    for threshold, key in ((0.5, "keep_t05"), (0.49, "keep_t049"), (0.7, "keep_t07")):
        rpn.nms_thresh = threshold
        assert rpn.select(boxes, torch.tensor(inputs["scores"]), 0.0).tolist() == expected[key]


def test_box_gradient_reaches_the_deltas_of_the_source_anchor(vectors):
    inputs, expected = vectors["PB1"]["inputs"], vectors["PB1"]["expected"]

    def gradient(limit, image_size):
        rpn = make_model("MNC.BOX_GRAD_CLIP", limit or 0.0, "PROPOSAL_GENERATOR.MIN_SIZE", 0)
        rpn = rpn.eval().proposal_generator
        anchor = Boxes(to_continuous(torch.tensor([inputs["anchor"]])))
        rpn.usable_anchors = lambda *_: torch.tensor([0])
        deltas = double([inputs["delta"]]).requires_grad_()
        logits = torch.zeros(1, 1, dtype=DOUBLE)
        predictions = AnchorPredictions(anchor, logits, deltas[None], (1, 1))
        (found,) = rpn.propose(predictions, [image_size])
        boxes = found.proposal_boxes.tensor
        assert boxes.dtype == DOUBLE and found.anchor_index.tolist() == [0]
        return torch.autograd.grad(boxes, deltas, double([inputs["grad_roi"]]))[0]

    size = tuple(inputs["im_hw"])
    close(gradient(None, size), expected["exact"], 1e-8)
    limit = 1 / 512
    close(gradient(limit, size), [max(-limit, min(limit, g)) for g in expected["exact"]], 1e-8)
    # The anchor, or only the proposal, reaches over the border.
    assert gradient(None, (600, 90)).abs().max() == 0
    assert gradient(None, (105, 800)).abs().max() == 0


def test_sampler_draws_from_three_intervals_without_refill(vectors):
    sampler = MNCSampler(num_classes=3)
    inputs, expected = vectors["SA1"]["inputs"], vectors["SA1"]["expected"]
    for (fg, near, far), counts in zip(inputs["available"], expected["counts"], strict=True):
        overlap = torch.cat([torch.full((n,), v) for n, v in ((fg, 0.8), (near, 0.3), (far, 0.05))])
        overlap = overlap[torch.randperm(len(overlap))]
        chosen = overlap[sampler.choose(overlap)]
        found = [int((chosen == v).sum()) for v in overlap.new_tensor([0.8, 0.3, 0.05])]
        assert found == counts
        assert chosen.tolist() == sorted(chosen.tolist(), reverse=True)


def test_images_and_feature_maps_have_the_released_sizes(vectors):
    inputs, expected = vectors["SC1"]["inputs"], vectors["SC1"]["expected"]
    config = get_config("../projects/MNC/configs/mnc_vgg16_voc_sds.py")
    augment = AugmentationList(
        [instantiate(a) for a in config.dataloader.test.mapper.augmentations]
    )
    vgg = VGG16().to("meta")
    for size, resized, cells in zip(
        inputs["hw"], expected["resized"], expected["conv5_hw"], strict=True
    ):
        image = AugInput(torch.zeros(*size, 3, dtype=torch.uint8).numpy())
        augment(image)
        assert list(image.image.shape[:2]) == resized
        features = vgg(torch.zeros(1, 3, *resized, device="meta"))["conv5_3"]
        assert list(features.shape) == [1, 512, *cells]


# ------------------------------------------------------------------------------------ the bridge


def test_bridge_refines_by_the_best_class(vectors):
    inputs, expected = vectors["SB1"]["inputs"], vectors["SB1"]["expected"]
    heads = make_model("MNC.LEGACY_PLUS_ONE", True).double().roi_heads
    size = tuple(inputs["im_hw"])
    box = exact_boxes(to_continuous(double([inputs["roi"]])))
    # Our head has no deltas of the background, which is the first class of the vector.
    deltas = double([inputs["bbox_pred_normalised"][4:]])

    def run(name):
        scores = double([inputs[f"probs_{name}"][1:] + inputs[f"probs_{name}"][:1]])
        category = type("Outputs", (), {"seg_logits": scores.log(), "deltas": deltas})
        return to_inclusive(heads.bridge([box], category, [size])[0])

    heads.train()
    close(run("a"), expected["a_train_fixed"])
    close(run("b"), expected["b_train_fixed"])
    heads.bridge_denormalize = False
    close(run("a"), expected["a_train_released"])
    close(run("b"), expected["b_train_released"])
    heads.eval()
    close(run("a"), expected["a_test"])
    # Background: the vector adds the deltas of an untrained row, 0.0064 pixels at most.
    close(run("b"), expected["b_test"], 0.017)
    x1, y1, x2, y2 = inputs["roi"]
    close(run("b"), [x1, y1, x2 + 1, y2 + 1])


def test_bridge_gradients_are_exact(vectors):
    inputs, expected = vectors["SB2"]["inputs"], vectors["SB2"]["expected"]
    box = to_continuous(double([inputs["roi"]])).requires_grad_()
    for key, name, weights in (
        ("delta", "exact_grad_delta", [1.0] * 4),
        ("normalised_delta", "exact_grad_normalised", [1 / s for s in STDS]),
    ):
        deltas = double([inputs[key]]).requires_grad_()
        for limit in (None, inputs["clip"]):
            out = bridge_boxes(
                box, deltas, torch.tensor([0]), MNCBoxTransform(weights), (150, 200), limit
            )
            by_delta, by_box = torch.autograd.grad(out, (deltas, box), double([inputs["grad_box"]]))
            values = expected[name]
            if limit is not None:
                values = [max(-limit, min(limit, v)) for v in values]
            close(by_delta, values, 1e-9)
            close(by_box, expected["exact_grad_roi"], 1e-9)
    assert values == expected["exact_grad_normalised_clipped"]


# ---------------------------------------------------------------------------------------- voting


@pytest.mark.parametrize("name", ["MV1", "MV3"])
def test_voting_follows_the_release(vectors, name):
    inputs = vectors[name]["inputs"]
    size = tuple(inputs["im_hw"])
    scores = torch.tensor(inputs["scores"])[:, 1:]
    candidates = Instances(
        size,
        pred_boxes=Boxes(to_continuous(torch.tensor(inputs["boxes"]))),
        pred_masks=torch.tensor(inputs["masks"])[:, None],
        class_scores=scores,
    )
    direct = InstanceVoting(masks="direct")(candidates, size)
    compat = InstanceVoting()(candidates, size)
    for entry in vectors[name]["expected"]["results"]:
        rows = (direct.pred_classes == entry.get("cls", 1) - 1) & torch.isclose(
            direct.scores, torch.tensor(entry["score"])
        )
        (row,) = rows.nonzero()[:, 0].tolist()
        for found in (direct, compat):
            box = to_inclusive(found.pred_boxes.tensor[row])
            assert box.tolist() == entry["box"]
        if "aggregate" in entry:
            expected = torch.tensor(entry["aggregate"]) > 0.4
            assert direct.pred_masks[row].equal(expected)
        x1, y1, x2, y2 = entry["box"]
        binary = (torch.tensor(entry["mask"]) >= 0.4).float()[None, None]
        resized = torch.nn.functional.interpolate(
            binary, (y2 - y1 + 1, x2 - x1 + 1), mode="bilinear", align_corners=False
        )
        expected = torch.zeros(size, dtype=torch.bool)
        expected[y1 : y2 + 1, x1 : x2 + 1] = resized[0, 0] >= 0.4
        assert compat.pred_masks[row].equal(expected)


def test_vote_without_a_pixel_takes_the_centre(vectors):
    inputs = vectors["MV2"]["inputs"]
    size = tuple(inputs["im_hw"])
    candidates = Instances(
        size,
        pred_boxes=Boxes(to_continuous(torch.tensor(inputs["boxes"], dtype=torch.float32))),
        pred_masks=torch.tensor(inputs["masks"])[:, None],
        class_scores=torch.tensor(inputs["scores"])[:, 1:],
    )
    for kind in ("compat", "direct"):
        found = InstanceVoting(masks=kind)(candidates, size)
        assert to_inclusive(found.pred_boxes.tensor).tolist() == [vectors["MV2"]["expected"]["box"]]
        assert not found.pred_masks.any()
