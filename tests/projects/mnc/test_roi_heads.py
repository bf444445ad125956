import pytest
import torch

from d2ext.errors import UserError
from d2ext.utils.testing import random_batch, training_losses

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.projects.mnc.helpers import make_model

FIRST = {"loss_mask_stage2", "loss_cls_stage3", "loss_seg_cls_stage3", "loss_box_reg_stage3"}
SECOND = {"loss_mask_stage4", "loss_cls_stage5", "loss_seg_cls_stage5", "loss_box_reg_stage5"}
RPN = {"loss_rpn_cls", "loss_rpn_loc"}


def near(batch, count=6, seed=0):
    """Proposals scattered around the objects."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for x in batch:
        boxes = x["instances"].gt_boxes.tensor.repeat(count, 1)
        boxes = Boxes(boxes + 3 * torch.randn(boxes.shape, generator=generator))
        boxes.clip(x["instances"].image_size)
        result.append(Instances(x["instances"].image_size, proposal_boxes=boxes))
    return result


def head_losses(model, batch, proposals):
    features = model.backbone(model.preprocess_image(batch).tensor)
    with EventStorage() as storage:
        _, losses = model.roi_heads(None, features, proposals, [x["instances"] for x in batch])
        return losses, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("stages, names", [(3, FIRST), (5, FIRST | SECOND)])
def test_losses_of_three_and_five_stages(stages, names):
    losses = training_losses(make_model("MNC.NUM_STAGES", stages), random_batch(2))
    assert set(losses) == names | RPN
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()


def test_passes_share_all_parameters():
    three, five = (make_model("MNC.NUM_STAGES", n).state_dict() for n in (3, 5))
    assert three.keys() == five.keys()
    assert all(three[k].shape == five[k].shape for k in three)
    heads = {k.split(".")[1] + "." + k.split(".")[2] for k in five if k.startswith("roi_heads.")}
    category = ("box_fc6", "box_fc7", "mask_fc6", "mask_fc7", "cls_score", "seg_cls_score")
    assert heads == {"mask_head.fc1", "mask_head.fc2"} | {
        f"category_head.{name}" for name in (*category, "bbox_pred")
    }


def test_second_pass_is_the_first_one_on_refined_boxes():
    """The losses of stages 4 and 5 are those of stages 2 and 3 for the boxes of the bridge."""
    model = make_model().train()
    heads, batch = model.roi_heads, random_batch(2)
    targets = [x["instances"] for x in batch]
    features = model.backbone(model.preprocess_image(batch).tensor)
    refined = []
    bridge = heads.bridge
    heads.bridge = lambda *args: refined.append(bridge(*args)) or refined[-1]
    with EventStorage():
        losses = heads(None, features, near(batch), targets)[1]
        samples = heads.sampler.label_all([b.detach() for b in refined[0]], targets)
        heads.num_stages = 3
        again = heads.losses(features, samples, targets)
    assert [len(s) for s in samples] == [len(b) + 3 for b in refined[0]]
    for name, value in again.items():
        stage = int(name[-1]) + 2
        torch.testing.assert_close(losses[f"{name[:-1]}{stage}"], value)


def test_counts_are_logged_per_image():
    model = make_model().train()
    batch = random_batch(2)
    _, logged = head_losses(model, batch, near(batch))
    assert 0 < logged["stage3/num_fg_boxes"] <= 8  # half of a batch of 16
    assert logged["stage3/num_fg_masks"] <= logged["stage3/num_fg_boxes"]
    assert logged["stage5/num_boxes"] == logged["stage3/num_boxes"] + 3


@pytest.mark.parametrize("objects", [0, 3])
@pytest.mark.parametrize("proposals", [0, 5])
def test_images_without_objects_or_proposals_give_finite_losses(objects, proposals):
    model = make_model().train()
    batch = random_batch(2, num_objects=objects)
    corner = torch.tensor([[0.0, 0, 9, 9]]).repeat(proposals, 1)
    given = [Instances((64, 96), proposal_boxes=Boxes(corner)) for _ in batch]
    losses, _ = head_losses(model, batch, given)
    assert set(losses) == FIRST | SECOND
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    if objects == 0:
        assert losses["loss_mask_stage2"] == losses["loss_box_reg_stage5"] == 0
    if objects == proposals == 0:
        assert sum(losses.values()) == 0


def test_one_empty_image_halves_what_the_other_one_counts():
    model = make_model("MNC.NUM_STAGES", 3).train()
    full, empty = random_batch(1), random_batch(1, num_objects=0, seed=1)
    nothing = Instances((64, 96), proposal_boxes=Boxes(torch.zeros(0, 4)))
    samples = model.roi_heads.sample(near(full), [full[0]["instances"]])
    beside = model.roi_heads.sample([nothing], [empty[0]["instances"]])
    features = model.backbone(model.preprocess_image(full + empty).tensor)
    targets = [x["instances"] for x in full + empty]
    with EventStorage():
        together = model.roi_heads.losses(features, samples + beside, targets)
        first = {name: x[:1] for name, x in features.items()}
        alone = model.roi_heads.losses(first, samples, targets[:1])
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value / 2)


@pytest.mark.parametrize("proposals", [0, 4])
def test_prediction_collects_the_candidates_of_both_passes(proposals):
    model = make_model().eval()
    batch = random_batch(2)
    features = model.backbone(model.preprocess_image(batch).tensor)
    boxes = torch.rand(proposals, 4).sort(dim=1).values * 60
    given = [Instances((64, 96), proposal_boxes=Boxes(boxes)) for _ in batch]
    with torch.no_grad():
        first, both = model.roi_heads.predict_stages(features, given)
        model.roi_heads.num_stages_test = 3
        (only,) = model.roi_heads.predict_stages(features, given)
    for a, b, c in zip(first, both, only, strict=True):
        assert len(a) == len(c) == proposals and len(b) == 2 * proposals
        assert a.pred_boxes.tensor.equal(boxes)
        assert b.pred_masks.shape == (2 * proposals, 1, 7, 7)
        assert b.class_scores.shape == (2 * proposals, 3)
        assert b.class_scores[:proposals].equal(c.class_scores)
        assert ((b.class_scores.sum(dim=1) < 1) & (b.class_scores >= 0).all(dim=1)).all()
        if proposals:
            assert not b.pred_boxes.tensor[proposals:].equal(boxes)


def test_leftover_of_the_release_pools_the_second_pass_differently():
    batch = random_batch(1)
    boxes = Boxes(torch.tensor([[5.0, 5, 50, 40], [20, 10, 70, 60]]))
    results = []
    for legacy in (False, True):
        model = make_model("MNC.LEGACY_LATE_WARP_TEST", legacy).eval()
        features = model.backbone(model.preprocess_image(batch).tensor)
        with torch.no_grad():
            given = [Instances((64, 96), proposal_boxes=boxes)]
            results.append(model.roi_heads.predict_stages(features, given)[-1][0].pred_masks)
    assert results[0][:2].equal(results[1][:2])
    assert not torch.allclose(results[0][2:], results[1][2:])


def test_other_numbers_of_stages_are_refused():
    with pytest.raises(UserError, match="3 or 5 stages: num_stages is 4"):
        make_model("MNC.NUM_STAGES", 4)


def test_several_feature_maps_are_refused():
    with pytest.raises(UserError, match="one feature map"):
        make_model("ROI_HEADS.IN_FEATURES", ["p2", "p3"])
    with pytest.raises(UserError, match="WARP_SIZE 7 is neither"):
        make_model("MNC.WARP_SIZE", 7)
    with pytest.raises(UserError, match="CATEGORY_HEAD 'X'"):
        make_model("MNC.CATEGORY_HEAD", "X")
