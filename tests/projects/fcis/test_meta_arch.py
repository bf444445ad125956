"""The whole network: batches, voting at the size of the output, results without voting."""

import pytest
import torch

from d2ext.modeling.regions.boxes import to_inclusive
from d2ext.utils.testing import random_batch, training_losses

from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.projects.fcis.helpers import make_model

SIZE = (64, 96)


def predict(model, batch):
    with torch.no_grad():
        return [x["instances"] for x in model.eval()(batch)]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    torch.testing.assert_close(first.scores, second.scores)
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert torch.equal(first.pred_classes, second.pred_classes)
    assert torch.equal(first.pred_masks, second.pred_masks)


@pytest.mark.parametrize(
    "overrides", [(), ("FCIS.OHEM", False), ("FCIS.JOINT", False), ("FCIS.GROUP_SIZE", 1)]
)
def test_a_batch_trains_like_its_images_one_by_one(overrides):
    model = make_model(*overrides)
    batch = random_batch(2, SIZE)
    together = training_losses(model, batch)
    alone = [training_losses(model, [x]) for x in batch]
    assert set(together) == {
        "loss_cls", "loss_mask", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc",
    }  # fmt: skip
    for name, loss in together.items():
        mean = sum(x[name].item() for x in alone) / 2
        assert loss.item() == pytest.approx(mean, rel=1e-4), name
        assert torch.isfinite(loss)


def test_a_batch_predicts_like_its_images_one_by_one():
    model = make_model()
    batch = random_batch(2, SIZE)
    together = predict(model, batch)
    for x, result in zip(batch, together):
        assert_same(predict(model, [x])[0], result)


def test_gradients_reach_every_part():
    model = make_model()
    sum(training_losses(model, random_batch(2, SIZE)).values()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("backbone.fpn_output", "backbone.fpn_lateral")) and "3" not in name:
            continue  # only one level is used
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("objects", [0, 1])
def test_images_with_few_objects_train(objects):
    losses = training_losses(make_model(), random_batch(2, SIZE, num_objects=objects))
    assert all(torch.isfinite(x) for x in losses.values())


def test_results_are_instances_at_the_size_of_the_output():
    model = make_model()
    batch = random_batch(1, SIZE)
    batch[0].update(height=100, width=120)
    (result,) = predict(model, batch)
    assert result.image_size == (100, 120) and len(result) > 0
    assert result.pred_masks.shape == (len(result), 100, 120)
    assert result.pred_masks.dtype == torch.bool
    assert (result.scores >= 0.001).all() and result.pred_classes.max() < 3
    for mask, box in zip(result.pred_masks, to_inclusive(result.pred_boxes.tensor).tolist()):
        rows, columns = mask.nonzero().unbind(1)
        if len(rows):  # the vote is resampled, so it may end inside its box
            assert box[0] <= columns.min() and columns.max() <= box[2]
            assert box[1] <= rows.min() and rows.max() <= box[3]


def test_masks_are_voted_for_in_the_image_not_in_the_network_input():
    """Boxes of detections are whole pixels of the output at any ratio to the input."""
    model = make_model()
    batch = random_batch(1, SIZE)
    candidates = model.eval().candidates(batch)[0]
    for height, width in ((64, 96), (128, 192), (31, 47)):
        batch[0].update(height=height, width=width)
        (result,) = predict(model, batch)
        assert torch.equal(result.pred_boxes.tensor, result.pred_boxes.tensor.round())
        scale = torch.tensor([width / 96, height / 64] * 2)
        boxes = candidates.pixel_boxes * scale
        last = torch.tensor([width - 1.0, height - 1.0] * 2)
        voted = model.roi_heads.voting(
            torch.minimum(boxes.clamp(min=0), last), candidates.pred_masks[:, 0],
            candidates.class_probs, (height, width),
        )  # fmt: skip
        assert torch.equal(to_inclusive(result.pred_boxes.tensor), voted.boxes.float())
        assert torch.equal(result.scores, voted.scores)


def test_stages_are_the_proposals_alone_and_with_the_refined_boxes():
    model = make_model().eval()
    batch = random_batch(1, SIZE)
    first, both = model.inference_stages(batch)
    assert_same(both[0]["instances"], predict(model, batch)[0])
    model.roi_heads.refine = False
    assert_same(first[0]["instances"], predict(model, batch)[0])


def test_without_voting_regions_keep_their_boxes():
    model = make_model("FCIS.VOTE", False).eval()
    batch = random_batch(1, SIZE)
    with torch.no_grad():
        (raw,) = model.inference(batch, do_postprocess=False)
    (result,) = predict(model, batch)
    assert raw.pred_masks.shape == (len(raw), 1, 6, 6) and len(raw) > 0
    boxes = to_inclusive(raw.pred_boxes.tensor).clamp(min=0).round()
    assert torch.equal(to_inclusive(result.pred_boxes.tensor), boxes)
    assert torch.equal(result.scores, raw.scores)
    assert result.pred_masks.shape == (len(raw), *SIZE)


def test_masks_of_given_instances_are_pasted():
    model = make_model().eval()
    given = Instances(SIZE, pred_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    given.pred_classes, given.scores = torch.tensor([1]), torch.tensor([0.5])
    batch = random_batch(1, SIZE)
    with torch.no_grad():
        (result,) = model.inference(batch, detected_instances=[given])
    result = result["instances"]
    assert result.pred_masks.shape == (1, *SIZE)
    assert not result.pred_masks[0, :8].any() and not result.pred_masks[0, :, 40:].any()


def test_no_proposals_give_no_detections():
    model = make_model()
    model.proposal_generator.min_box_size = 1000.0
    results = predict(model, random_batch(2, SIZE))
    assert [len(r) for r in results] == [0, 0]
    assert results[0].pred_masks.shape == (0, *SIZE)


def test_proposals_may_come_with_the_input():
    model = make_model()
    batch = random_batch(1, SIZE)
    boxes = Boxes(torch.tensor([[4.0, 4, 50, 50], [20, 10, 90, 60]]))
    batch[0]["proposals"] = Instances(
        SIZE, proposal_boxes=boxes, objectness_logits=torch.tensor([1.0, 0.0])
    )
    model.proposal_generator = None
    candidates = model.eval().candidates(batch)[0]
    assert len(candidates) == 4
    assert torch.equal(candidates.pred_boxes.tensor[:2], boxes.tensor)
    assert torch.equal(candidates.pixel_boxes, to_inclusive(candidates.pred_boxes.tensor))
    with EventStorage():
        losses = model.train()(batch)
    assert set(losses) == {"loss_cls", "loss_mask", "loss_box_reg"}


def test_it_is_a_generalized_rcnn():
    assert isinstance(make_model(), GeneralizedRCNN)


def test_only_regions_above_the_merge_iou_vote():
    batch = random_batch(1, SIZE)
    merged = predict(make_model(), batch)[0].pred_masks
    alone = predict(make_model("FCIS.MERGE_IOU", 1.0), batch)[0].pred_masks
    assert merged.shape == alone.shape and not torch.equal(merged, alone)
    # With a threshold that only the region itself reaches, one candidate less changes no other.
    model = make_model("FCIS.MERGE_IOU", 1.0).eval()
    pool = model.candidates(batch)[0]
    vote = model.roi_heads.voting
    arguments = (pool.pixel_boxes, pool.pred_masks[:, 0])
    first = vote(*arguments, pool.class_probs, SIZE)
    seed = int(first.seeds[0])
    single = vote(*(x[seed : seed + 1] for x in (*arguments, pool.class_probs)), SIZE)
    torch.testing.assert_close(single.masks[0], first.masks[0])


def test_the_binary_threshold_decides_how_large_masks_are():
    batch = random_batch(1, SIZE)
    areas = [
        predict(make_model("FCIS.VOTE", False, "FCIS.BINARY_THRESH", threshold), batch)[0]
        .pred_masks.sum(dim=(1, 2))
        .float()
        for threshold in (0.2, 0.4, 0.8)
    ]
    assert (areas[0] >= areas[1]).all() and (areas[1] >= areas[2]).all()
    assert areas[0].sum() > areas[1].sum() > areas[2].sum()
