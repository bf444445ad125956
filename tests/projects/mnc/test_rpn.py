import pytest
import torch

from d2ext.modeling import CaffeRPN
from d2ext.projects.mnc.rpn import relabel_anchors
from d2ext.utils.testing import random_batch

from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from tests.projects.mnc.helpers import make_model


def stages_of(model, batch):
    """Inputs of the proposal generator for a batch."""
    images = model.preprocess_image(batch)
    return images, model.backbone(images.tensor), [x["instances"] for x in batch]


def test_sampled_boxes_relabel_their_anchors_unless_they_leave_the_image():
    labels = torch.tensor([-1, 1, 0, 0, -1, -1, 1])
    samples = Instances((9, 9))
    samples.anchor_index = torch.tensor([0, 2, 5, 1, 4, -1, 6])
    samples.foreground = torch.tensor([True, True, True, False, False, False, False])
    inside = torch.tensor([True, True, True, True, True, False, True])
    assert relabel_anchors(labels, samples, inside).tolist() == [1, 0, 1, 0, 0, -1, 0]
    # An anchor that gave both is foreground.
    samples.anchor_index = torch.tensor([3, 3, 3, 3, 3, 3, 3])
    assert relabel_anchors(labels, samples, inside).tolist() == [-1, 1, 0, 1, -1, -1, 1]


@pytest.mark.parametrize("relabel", [True, False])
def test_rpn_learns_from_the_samples_of_the_heads_only_if_told_to(relabel, monkeypatch):
    model = make_model("MNC.RPN_RELABEL_FROM_ROIS", relabel).train()
    rpn, seen = model.proposal_generator, []
    losses = rpn.losses

    def spy(anchors, logits, labels, deltas, boxes):
        seen.append(labels)
        return losses(anchors, logits, labels, deltas, boxes)

    monkeypatch.setattr(rpn, "losses", spy)
    images, features, targets = stages_of(model, random_batch(2))
    predictions = rpn.predict_anchors(features)
    proposals = rpn.propose(predictions, images.image_sizes)
    samples = model.roi_heads.sample(proposals, targets)
    with EventStorage():
        rpn.losses_with_samples(predictions, targets, samples)
    agree = []
    for labels, sample in zip(seen[0], samples, strict=True):
        source = sample.anchor_index
        height, width = sample.image_size
        limits = torch.tensor([width, height])
        corners = predictions.anchors.tensor[source]
        inside = (corners[:, :2] >= 0).all(dim=1) & (corners[:, 2:] <= limits).all(dim=1)
        known = (source >= 0) & inside
        assert known.sum() > 2
        agree += (labels[source[known]] == sample.foreground[known].to(labels.dtype)).tolist()
    assert all(agree) == relabel


def test_rpn_alone_trains_and_proposes_like_any_other():
    model = make_model().train()
    images, features, targets = stages_of(model, random_batch(2))
    with EventStorage():
        proposals, losses = model.proposal_generator(images, features, targets)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    for proposal in proposals:
        scores = proposal.objectness_logits
        assert len(proposal) and scores.equal(scores.sort(descending=True).values)
        assert not scores.requires_grad
        height, width = proposal.image_size
        x1, y1, x2, y2 = proposal.proposal_boxes.tensor.unbind(dim=1)
        assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= width).all() and (y2 <= height).all()


def test_proposals_are_those_of_the_shared_rpn():
    model = make_model().eval()
    images, features, _ = stages_of(model, random_batch(1, size=(64, 96)))
    rpn = model.proposal_generator
    with torch.no_grad():
        found, _ = rpn(images, features)
        plain = CaffeRPN.propose(rpn, rpn.predict_anchors(features), images.image_sizes)
    torch.testing.assert_close(
        found[0].proposal_boxes.tensor, plain[0].proposal_boxes.tensor, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_smallest_proposal_is_measured_in_pixels_of_the_original_image(scaled):
    overrides = ("CAFFE_RPN.SCALE_MIN_SIZE", scaled, "PROPOSAL_GENERATOR.MIN_SIZE", 10)
    model = make_model(*overrides).eval()
    images, features, _ = stages_of(model, random_batch(1, size=(64, 96)))
    rpn, sides = model.proposal_generator, {}
    for factor in (1, 2):
        with torch.no_grad():
            predictions = rpn.predict_anchors(features)
            (proposals,) = rpn.propose(predictions, images.image_sizes, [factor])
        boxes = proposals.proposal_boxes.tensor
        sides[factor] = float((boxes[:, 2:] - boxes[:, :2]).min())
    assert 10 <= sides[1] < 20
    assert (sides[2] >= 20) == scaled


def test_the_detector_tells_the_size_of_the_original_image():
    scaled = ("CAFFE_RPN.SCALE_MIN_SIZE", True, "PROPOSAL_GENERATOR.MIN_SIZE", 10)
    model = make_model(*scaled, "MNC.NUM_STAGES_TEST", 3).eval()
    (x,) = random_batch(1, size=(64, 96))
    x.update(height=32, width=48)
    with torch.no_grad():
        (candidates,) = model.inference([x], do_postprocess=False)
    boxes = candidates.pred_boxes.tensor  # without a second pass those of the proposals
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 20


def test_cells_cut_by_the_border_propose_but_those_of_the_padding_do_not():
    rpn = make_model().proposal_generator
    anchors = rpn.anchor_generator.num_anchors[0]
    usable = rpn.usable_anchors((16, 24), (61, 66), torch.device("cpu"))
    rows, columns = usable // anchors // 24, usable // anchors % 24
    assert rows.max() == 15 and columns.max() == 16 and len(usable) == 16 * 17 * anchors
