"""What is learned through box coordinates: against finite differences, and path by path."""

import pytest
import torch

from d2ext.projects.mnc.box_transform import exact_boxes
from d2ext.utils.testing import random_batch

from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from tests.projects.mnc.helpers import make_model

DOUBLE = torch.float64


@pytest.fixture
def network():
    def make(*overrides):
        model = make_model(*overrides).double().train()
        # Anchors and proposals must be inside the image to have a gradient.
        torch.nn.init.normal_(model.proposal_generator.rpn_head.anchor_deltas.weight, std=0.02)
        return model

    return make


def losses_of(model, batch):
    with EventStorage():
        return model(batch)


def head_loss(losses):
    return sum(value for name, value in losses.items() if "rpn" not in name)


def gradient(value, parameter):
    """Zeros where there is no path."""
    found = torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(parameter) if found is None else found


class Constants:
    """Makes the constants of a first run constants of the next ones, too.

    The gradient leaves out how targets, and masks without gradient, depend on the weights; a finite
    difference would not.
    """

    def __init__(self, model, monkeypatch):
        self.recorded, self.position = [], None
        heads, rpn = model.roi_heads, model.proposal_generator
        encode, gate, propose = heads.box_transform.get_deltas, heads.gate, rpn.propose

        def constant_gate(probabilities, classes):
            fixed = self.fix(probabilities.detach())
            trained = (classes < heads.num_classes)[:, None, None, None]
            result = torch.where(trained, probabilities, fixed)
            if self.position is None:  # the network's own choice has the same gradient
                expected = gate(probabilities, classes)
                (a,), (b,) = (
                    torch.autograd.grad(x.sum(), probabilities, retain_graph=True)
                    for x in (result, expected)
                )
                assert a.equal(b) and result.equal(expected)
            return result

        def inside(*args):
            """Only proposals that have a gradient."""
            predictions, sizes = args[:2]
            return [inside_image(predictions, *x) for x in zip(propose(*args), sizes)]

        def inside_image(predictions, found, size):
            anchors = predictions.anchors.tensor[found.anchor_index]
            rows = torch.ones(len(found), dtype=torch.bool)
            limits = torch.tensor([size[1], size[0]])
            for boxes in (anchors, found.proposal_boxes.tensor.detach()):
                rows &= (boxes[:, :2] > 0).all(dim=1) & (boxes[:, 2:] < limits).all(dim=1)
            result = Instances(size, anchor_index=found.anchor_index[rows])
            result.proposal_boxes = exact_boxes(found.proposal_boxes.tensor[rows])
            return result

        monkeypatch.setattr(heads.box_transform, "get_deltas", lambda *x: self.fix(encode(*x)))
        monkeypatch.setattr(heads, "gate", constant_gate)
        monkeypatch.setattr(rpn, "propose", inside)

    def fix(self, value):
        if self.position is None:
            self.recorded.append(value)
            return value
        self.position += 1
        return self.recorded[self.position - 1]

    def replay(self):
        self.position = 0


@pytest.mark.parametrize("stages", [3, 5])
def test_gradient_of_the_rpns_box_weights_equals_finite_differences(network, monkeypatch, stages):
    model = network("MNC.BOX_GRAD_CLIP", 0.0, "MNC.NUM_STAGES", stages)
    batch = random_batch(2)
    constants = Constants(model, monkeypatch)
    weight = model.proposal_generator.rpn_head.anchor_deltas.weight
    exact = gradient(head_loss(losses_of(model, batch)), weight)
    assert exact.abs().max() > 1e-3
    generator = torch.Generator().manual_seed(0)
    step, start = 1e-6, weight.detach().clone()
    for _ in range(4):
        direction = torch.randn(weight.shape, generator=generator, dtype=DOUBLE)
        values = []
        for sign in (1, -1):
            constants.replay()
            with torch.no_grad():
                weight.copy_(start + sign * step * direction)
            values.append(head_loss(losses_of(model, batch)).detach())
        difference = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((exact * direction).sum(), difference, rtol=1e-4, atol=0)


def test_detached_boxes_send_no_gradient_into_the_rpn(network):
    model = network("MNC.BOX_GRADIENT", False, "MNC.BOX_GRAD_CLIP", 0.0)
    losses = losses_of(model, random_batch(2))
    weight = model.proposal_generator.rpn_head.anchor_deltas.weight
    assert gradient(head_loss(losses), weight).abs().max() == 0
    assert gradient(losses["loss_rpn_loc"], weight).abs().max() > 0
    # Nor from the second pass into the box deltas of the first.
    late = losses["loss_mask_stage4"]
    assert gradient(late, model.roi_heads.category_head.bbox_pred.weight).abs().max() == 0


def test_mask_losses_alone_reach_the_box_branches(network):
    model = network()
    losses = losses_of(model, random_batch(2))
    rpn, head = model.proposal_generator.rpn_head, model.roi_heads.category_head
    for name in ("loss_mask_stage2", "loss_mask_stage4"):
        assert gradient(losses[name], rpn.anchor_deltas.weight).abs().max() > 0
        # Ranking and suppression only select.
        assert gradient(losses[name], rpn.objectness_logits.weight).abs().max() == 0
    assert gradient(losses["loss_mask_stage4"], head.bbox_pred.weight).abs().max() > 0
    assert gradient(losses["loss_mask_stage2"], head.bbox_pred.weight).abs().max() == 0
    # The class that refines a box is chosen by index.
    assert gradient(losses["loss_mask_stage4"], head.seg_cls_score.weight).abs().max() == 0


def test_category_losses_reach_the_mask_head_through_the_gate(network):
    model = network()
    heads = model.roi_heads
    heads.mask_iou_threshold = 0.0  # all foreground boxes count
    losses = losses_of(model, random_batch(2))
    assert gradient(losses["loss_cls_stage3"], heads.mask_head.fc2.weight).abs().max() > 0
    heads.gate_gradient = False
    losses = losses_of(model, random_batch(2))
    assert gradient(losses["loss_cls_stage3"], heads.mask_head.fc2.weight).abs().max() == 0


def test_box_gradient_is_limited_per_image_and_only_on_its_branch(network):
    limit = 1e-5
    model = network("MNC.BOX_GRAD_CLIP", limit)
    deltas = []
    rpn_head, category = model.proposal_generator.rpn_head, model.roi_heads.category_head
    handles = [
        rpn_head.anchor_deltas.register_forward_hook(lambda m, i, o: deltas.append(o)),
        category.bbox_pred.register_forward_hook(lambda m, i, o: deltas.append(o)),
    ]
    losses = losses_of(model, random_batch(2))
    for handle in handles:
        handle.remove()
    rpn_deltas, first_pass = deltas[:2]
    for value in (
        gradient(head_loss(losses), rpn_deltas),
        gradient(losses["loss_mask_stage4"], first_pass),
    ):
        assert value.abs().max() == pytest.approx(limit / 2)  # 2 images
    assert gradient(losses["loss_rpn_loc"], rpn_deltas).abs().max() > limit
    assert gradient(losses["loss_box_reg_stage3"], first_pass).abs().max() > limit


def test_gradient_of_two_images_is_the_mean_of_theirs(network):
    """Per-image averages and limits: as the release, which runs the images one by one."""
    model = network("MNC.BOX_GRAD_CLIP", 1e-5)
    batch = random_batch(2)
    parameters = [
        model.proposal_generator.rpn_head.anchor_deltas.weight,
        model.roi_heads.category_head.bbox_pred.weight,
        model.roi_heads.mask_head.fc2.weight,
    ]
    together, first, second = (
        torch.autograd.grad(sum(losses_of(model, images).values()), parameters)
        for images in (batch, batch[:1], batch[1:])
    )
    for a, b, c in zip(together, first, second, strict=True):
        torch.testing.assert_close(a, (b + c) / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_limits_grow_with_the_scale_of_mixed_precision(network, dtype):
    """GradScaler multiplies the losses and divides the gradients; the limits are in between."""
    model = network("MNC.BOX_GRAD_CLIP", 1e-5).to(dtype)
    parameters = [
        model.proposal_generator.rpn_head.anchor_deltas.weight,
        model.roi_heads.category_head.bbox_pred.weight,
    ]
    batch, scale = random_batch(2), 2.0**16
    for names in (["loss_mask_stage4"], None):  # some of the losses, or all
        losses = losses_of(model, batch)
        total = sum(losses[name] for name in names or losses)
        plain = torch.autograd.grad(total, parameters, retain_graph=True)
        scaled = torch.autograd.grad(scale * total, parameters)
        for a, b in zip(plain, scaled, strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(b / scale, a, rtol=0, atol=0)  # powers of two are exact


def test_measuring_the_scale_leaves_losses_and_gradients_as_they_are(network, monkeypatch):
    model = network().float()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        losses = losses_of(model, random_batch(2))
        found = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
        return losses, [torch.zeros(1) if x is None else x for x in found]

    losses, gradients = step()
    monkeypatch.setattr("d2ext.projects.mnc.meta_arch.with_probes", lambda losses, probes: losses)
    for a, b in zip((*losses.values(), *gradients), (lambda x, y: (*x.values(), *y))(*step())):
        assert a.equal(b)


def test_undone_normalisation_in_the_bridge_leaves_the_limit_on_the_outputs_of_the_network(network):
    limit = 1e-6
    model = network("MNC.BOX_GRAD_CLIP", limit, "MNC.BRIDGE_DENORMALIZE_IN_TRAIN", False)
    deltas = []
    layer = model.roi_heads.category_head.bbox_pred
    handle = layer.register_forward_hook(lambda m, i, o: deltas.append(o))
    losses = losses_of(model, random_batch(2))
    handle.remove()
    found = gradient(losses["loss_mask_stage4"], deltas[0])
    assert found.abs().max() == pytest.approx(limit / 2)
