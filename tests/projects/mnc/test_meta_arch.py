import pytest
import torch

from d2ext.data import InstanceSegMapper
from d2ext.evaluation import build_evaluator
from d2ext.modeling.regions.boxes import pixel_boxes, to_inclusive
from d2ext.modeling.regions.targets import resize_masks
from d2ext.utils.testing import random_batch, training_losses

from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from tests.projects.mnc.helpers import make_model


def test_prediction_has_the_size_of_the_original_image():
    model = make_model().eval()
    batch = [dict(random_batch(1)[0], height=h, width=w) for h, w in ((64, 96), (32, 48))]
    with torch.no_grad():
        results = model(batch)
    for x, result in zip(batch, results, strict=True):
        found = result["instances"]
        assert found.image_size == (x["height"], x["width"])
        assert 0 < len(found) and found.pred_masks.shape[1:] == found.image_size
        assert set(found.get_fields()) == {"pred_boxes", "pred_masks", "scores", "pred_classes"}
        boxes = found.pred_boxes.tensor
        assert (boxes[:, 2] <= x["width"]).all() and (boxes[:, 3] <= x["height"]).all()


def test_images_of_a_batch_do_not_disturb_each_other():
    model = make_model().eval()
    batch = random_batch(2)
    with torch.no_grad():
        together = model(batch)
        alone = [model([x])[0] for x in batch]
    for a, b in zip(together, alone, strict=True):
        a, b = a["instances"], b["instances"]
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert a.pred_masks.equal(b.pred_masks)


def test_images_of_different_sizes_train_together():
    batch = random_batch(1, size=(64, 96)) + random_batch(1, size=(80, 60))
    losses = training_losses(make_model(), batch)
    assert all(torch.isfinite(x) for x in losses.values())


def test_training_does_not_depend_on_the_global_generator():
    model, batch = make_model(), random_batch(2)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(training_losses(model, batch))
    assert results[0] == results[1]
    other = training_losses(model, [dict(x, sample_seed=7) for x in batch])
    assert other["loss_rpn_cls"] != results[0]["loss_rpn_cls"]


def test_losses_are_the_mean_of_those_of_the_images():
    model, batch = make_model(), random_batch(2)
    together = training_losses(model, batch)
    first, second = (training_losses(model, [x]) for x in batch)
    for name, value in together.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-5)


def test_stages_are_predicted_one_by_one():
    model, batch = make_model().eval(), random_batch(1)
    three, five = model.inference_stages(batch)
    with torch.no_grad():
        assert model(batch)[0]["instances"].scores.equal(five[0]["instances"].scores)
        model.roi_heads.num_stages_test = 3
        assert model(batch)[0]["instances"].scores.equal(three[0]["instances"].scores)
    assert len(model.inference_stages(batch)) == 1
    assert not three[0]["instances"].pred_masks.equal(five[0]["instances"].pred_masks)


def test_training_boxes_are_drawn_when_asked_for():
    model, batch = make_model().train(), random_batch(1)
    model.vis_period = 2
    drawn = []
    with EventStorage() as storage:
        storage.put_image = lambda name, image: drawn.append(image.shape)
        for _ in range(3):
            model(batch)
            storage.step()
    assert drawn == [(3, 64, 192)] * 2


def test_given_boxes_are_refused():
    model, batch = make_model().eval(), random_batch(1)
    with pytest.raises(NotImplementedError, match="their own boxes"):
        model.inference(batch, detected_instances=[Instances((64, 96))])


def test_candidates_are_returned_without_postprocessing():
    model = make_model().eval()
    with torch.no_grad():
        (found,) = model.inference(random_batch(1), do_postprocess=False)
    assert len(found) % 2 == 0 and found.has("class_scores") and found.image_size == (64, 96)


@pytest.mark.parametrize("kind", ["compat", "direct"])
def test_true_masks_as_candidates_come_back_through_voting_and_evaluation(shapes_few, kind):
    """21 x 21 masks of the ground truth on three jittered boxes each: an AP50 of nearly 100."""
    voting = make_model("MNC.OUTPUT_MASKS", kind, "ROI_HEADS.NUM_CLASSES", 8).voting
    mapper = InstanceSegMapper(
        True, augmentations=[], mask_format="bitmask", semantic="none", num_classes=8
    )
    evaluator = build_evaluator(shapes_few)
    evaluator.reset()
    generator = torch.Generator().manual_seed(0)
    for record in DatasetCatalog.get(shapes_few):
        target = mapper(record)["instances"]
        size, rows = target.image_size, torch.arange(len(target)).repeat(3)
        boxes = target.gt_boxes.tensor[rows]
        boxes = Boxes(boxes + torch.randn(boxes.shape, generator=generator) / 2)
        boxes.clip(size)
        scores = torch.zeros(len(rows), 8)
        scores[torch.arange(len(rows)), target.gt_classes[rows]] = 0.9
        pixels = pixel_boxes(boxes.tensor)
        masks = resize_masks(target.gt_masks.tensor, rows, pixels, 21, 0.4).float()
        given = Instances(size, pred_boxes=boxes, pred_masks=masks[:, None], class_scores=scores)
        found = voting(given, size)
        found = found[found.scores > 0.5]
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["segm"]["AP50"] > 95


def test_unshared_features_come_from_backbones_of_their_own():
    model = make_model("MNC.SHARED_FEATURES", False, "MNC.BOX_GRADIENT", False)
    losses = training_losses(model, random_batch(2))

    def reaches(name, tower):
        value = torch.autograd.grad(
            losses[name], list(tower.parameters()), retain_graph=True, allow_unused=True
        )
        return any(g is not None and g.abs().max() > 0 for g in value)

    towers = {"rpn": model.backbone, "mask": model.mask_backbone, "cls": model.category_backbone}
    found = {
        name: {key for key, tower in towers.items() if reaches(name, tower)}
        for name in ("loss_rpn_cls", "loss_mask_stage2", "loss_box_reg_stage3")
    }
    assert found["loss_rpn_cls"] == {"rpn"} and found["loss_mask_stage2"] == {"mask"}
    assert "cls" in found["loss_box_reg_stage3"] and "rpn" not in found["loss_box_reg_stage3"]
    with torch.no_grad():
        assert len(model.eval()(random_batch(1)))


def test_backbones_of_the_stages_start_from_the_weights_of_the_shared_one():
    shared = make_model(seed=3).state_dict()
    model = make_model("MNC.SHARED_FEATURES", False, seed=4)
    result = model.load_state_dict(shared)
    assert not result.missing_keys and not result.unexpected_keys
    for key, value in model.backbone.state_dict().items():
        assert model.mask_backbone.state_dict()[key].equal(value)
        assert model.category_backbone.state_dict()[key].equal(value)
    # Weights of their own are kept.
    own = {k: v + 1 if k.startswith("mask_backbone") else v for k, v in model.state_dict().items()}
    model.load_state_dict(own)
    assert all(model.state_dict()[k].equal(v) for k, v in own.items())


def test_sampled_boxes_are_drawn_before_the_losses_of_the_rpn():
    """The samples that the heads train on are those the RPN has seen."""
    model, seen = make_model(), {}
    heads, rpn = model.roi_heads, model.proposal_generator
    of_heads, of_rpn, batch = heads.losses, rpn.losses_with_samples, random_batch(1)
    heads.losses = lambda f, samples, t: seen.update(heads=samples) or of_heads(f, samples, t)
    rpn.losses_with_samples = lambda p, t, s: seen.update(rpn=s) or of_rpn(p, t, s)
    training_losses(model, batch)
    assert seen["rpn"] is seen["heads"]
    with torch.no_grad():
        iou = pairwise_iou(seen["rpn"][0].proposal_boxes, batch[0]["instances"].gt_boxes)
    assert (iou.max(dim=1).values >= 0.5).equal(seen["rpn"][0].foreground)
    assert to_inclusive(seen["rpn"][0].proposal_boxes.tensor).isfinite().all()
