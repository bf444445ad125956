"""Training and prediction of FCIS' region heads."""

import pytest
import torch
from torch.nn import functional as F

from d2ext.errors import UserError
from d2ext.modeling.regions.boxes import pixel_boxes
from d2ext.modeling.regions.targets import resize_masks
from d2ext.ops import ps_roi_assemble, ps_roi_mean
from d2ext.ops.poolers import boxes_to_rois
from d2ext.projects.fcis.roi_heads import ScoreMaps
from d2ext.utils.testing import near_objects, random_batch

from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.projects.fcis.helpers import make_heads

K, SIZE = 2, (64, 96)


def pyramid(images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"res5": torch.randn(images, 4, 4, 6, generator=generator).requires_grad_()}


def make_proposals(count, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(images):
        corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([96.0, 64.0])
        boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)
        boxes = Boxes(boxes)
        boxes.clip(SIZE)
        result.append(Instances(SIZE, proposal_boxes=boxes))
    return result


def make_targets(count, images=2):
    batch = random_batch(images, SIZE, num_objects=count, num_classes=K)
    return [x["instances"] for x in batch]


def small(make_heads, seed=0, **arguments):
    torch.manual_seed(seed)
    heads = make_heads(K, group_size=3, out_size=6, batch_size_per_image=16, **arguments)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def losses_of(heads, features, proposals, targets):
    with EventStorage():
        return heads.train()(None, features, proposals, targets)[1]


# -------------------------------------------------------------------------------- what is read


def test_parameters_have_the_names_and_shapes_of_the_release():
    shapes = {name: tuple(p.shape) for name, p in make_heads(20, in_channels=8).named_parameters()}
    assert shapes == {
        "conv_new.weight": (4, 8, 1, 1),
        "conv_new.bias": (4,),
        "cls_seg.weight": (98 * 21, 4, 1, 1),
        "cls_seg.bias": (98 * 21,),
        "bbox.weight": (196, 4, 1, 1),
        "bbox.bias": (196,),
    }


@pytest.mark.parametrize("inclusive", [True, False])
def test_fused_scores_equal_those_of_assembled_maps(inclusive):
    heads = small(make_heads, inclusive=inclusive)
    maps = heads.score_maps(pyramid())
    boxes = [p.proposal_boxes for p in make_proposals(9)]
    scores = heads.score_regions(maps, boxes)
    rois = boxes_to_rois(boxes, inclusive=inclusive)
    cells = ps_roi_assemble(maps.score, rois, 1 / 16, 3, 6, inclusive=inclusive)
    cells = cells.view(18, K + 1, 2, 6, 6)
    logits = cells.max(dim=2).values.mean(dim=(2, 3))
    torch.testing.assert_close(scores.logits, logits)
    best = logits[:, :K].argmax(dim=1)
    assert scores.picked.tolist() == best.tolist()
    torch.testing.assert_close(scores.seg, cells[torch.arange(18), best])
    torch.testing.assert_close(
        scores.deltas, ps_roi_mean(maps.box, rois, 1 / 16, 3, 6, inclusive=inclusive)
    )


def test_separate_maps_classify_with_the_first_and_segment_with_the_second_of_a_pair():
    heads = small(make_heads, joint=False)
    maps = heads.score_maps(pyramid())
    boxes = [p.proposal_boxes for p in make_proposals(9)]
    cells = ps_roi_assemble(maps.score, boxes_to_rois(boxes, inclusive=True), 1 / 16, 3, 6,
                            inclusive=True).view(18, K + 1, 2, 6, 6)  # fmt: skip
    scores = heads.score_regions(maps, boxes)
    torch.testing.assert_close(scores.logits, cells[:, :, 0].mean(dim=(2, 3)))
    best = scores.logits[:, :K].argmax(dim=1)
    assert torch.equal(scores.picked, best)
    inside = scores.seg.softmax(dim=1)[:, 1]
    torch.testing.assert_close(inside, cells[torch.arange(18), best, 1].sigmoid())


def test_a_network_of_one_part_does_not_tell_where_in_a_region_a_cell_is():
    """Mirroring map and region mirrors the mask of k = 1, and only that one."""
    for group, equal in ((1, True), (3, False)):
        heads = make_heads(K, group_size=group, out_size=6)
        parts = group * group
        score = torch.randn(1, 2 * (K + 1) * parts, 4, 6)
        boxes = [Boxes(torch.tensor([[0.0, 0, 96, 64]]))]
        pick = torch.tensor([1])
        empty = torch.zeros(1, 4 * parts, 4, 6)
        one = heads.score_regions(ScoreMaps(score, empty), boxes, pick)
        other = heads.score_regions(ScoreMaps(score.flip(-1), empty), boxes, pick)
        assert torch.allclose(one.seg, other.seg.flip(-1), atol=1e-5) is equal
        assert torch.allclose(one.logits, other.logits, atol=1e-5) is equal


# ------------------------------------------------------------------------------------ training


def losses_by_hand(heads, features, proposals, targets):
    """All losses from assembled maps, region by region."""
    maps = heads.score_maps(features)
    total = {"loss_cls": 0.0, "loss_mask": 0.0, "loss_box_reg": 0.0}
    samples = heads.sampler([p.proposal_boxes for p in proposals], targets, "regions")
    for image, sample in enumerate(samples):
        rows = []
        for box, label, gt in zip(
            sample.proposal_boxes.tensor, sample.gt_classes.tolist(), sample.gt_index.tolist()
        ):
            roi = torch.tensor([[image, *(box - torch.tensor([0.0, 0, 1, 1])).tolist()]])
            cells = ps_roi_assemble(maps.score, roi, 1 / 16, 3, 6, inclusive=True).view(
                K + 1, 2, 6, 6
            )
            cls = -cells.max(dim=1).values.mean(dim=(1, 2)).log_softmax(dim=0)[label]
            mask, reg = torch.tensor(0.0), torch.tensor(0.0)
            if label < K:
                target = targets[image]
                row = torch.tensor([gt])
                limits = pixel_boxes(target.gt_boxes.tensor[row])
                masks = target.gt_masks.tensor
                inside = resize_masks(masks, row, pixel_boxes(box[None]), 6, 0.4, limits)[0]
                probability = cells[label].log_softmax(dim=0)
                mask = -torch.where(inside, probability[1], probability[0]).mean()
                deltas = ps_roi_mean(maps.box, roi, 1 / 16, 3, 6, inclusive=True)[0]
                g = target.gt_boxes.tensor[gt]
                (w, h), (gw, gh) = box[2:] - box[:2], g[2:] - g[:2]
                centre = ((g[:2] + g[2:]) - (box[:2] + box[2:])) / 2
                wanted = torch.stack(
                    [5 * centre[0] / w, 5 * centre[1] / h, 2 * (gw / w).log(), 2 * (gh / h).log()]
                )
                reg = F.smooth_l1_loss(deltas, wanted, reduction="sum")
            rows.append((cls, mask, reg))
        rows.sort(key=lambda r: -(r[0] + 10 * r[1] + r[2]).item())
        rows = rows[:16]
        total["loss_cls"] += sum(r[0] for r in rows) / len(rows) / 2
        total["loss_mask"] += 10 * sum(r[1] for r in rows) / 16 / 2
        total["loss_box_reg"] += sum(r[2] for r in rows) / 16 / 2
    return total


def test_losses_and_gradients_equal_a_transcription():
    heads, features = small(make_heads), pyramid()
    batch = random_batch(2, SIZE, num_classes=K)
    proposals, targets = near_objects(batch), [x["instances"] for x in batch]
    ours = losses_of(heads, features, proposals, targets)
    expected = losses_by_hand(heads, features, proposals, targets)
    assert ours.keys() == expected.keys()
    gradients = []
    for losses in (ours, expected):
        for parameter in (*heads.parameters(), features["res5"]):
            parameter.grad = None
        sum(losses.values()).backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in (*heads.parameters(), features["res5"])])
    for name in ours:
        assert ours[name].item() == pytest.approx(expected[name].item(), rel=1e-4), name
        assert ours[name].item() > 0
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("task", ["loss_cls", "loss_mask", "loss_box_reg"])
def test_every_loss_reaches_its_maps_and_the_features(joint, task):
    heads, features = small(make_heads, joint=joint), pyramid()
    batch = random_batch(2, SIZE, num_classes=K)
    losses = losses_of(heads, features, near_objects(batch), [x["instances"] for x in batch])
    losses[task].backward()
    assert features["res5"].grad.isfinite().all() and features["res5"].grad.abs().sum() > 0
    by_side = heads.cls_seg.weight.grad
    if task == "loss_box_reg":
        assert by_side is None or not by_side.any()
        assert heads.bbox.weight.grad.any()
        return
    by_side = by_side.unflatten(0, (K + 1, 2, -1))
    assert not by_side[K].any() if task == "loss_mask" else by_side[K].any()
    reached = [bool(by_side[:, side].any()) for side in range(2)]
    separate = [True, False] if task == "loss_cls" else [False, True]
    assert reached == ([True, True] if joint else separate)


def test_loss_weights_scale_the_losses():
    batch = random_batch(2, SIZE, num_classes=K)
    arguments = pyramid(), near_objects(batch), [x["instances"] for x in batch]
    one, other = (
        losses_of(small(make_heads, ohem=False, loss_weights=w), *arguments)
        for w in ((1.0, 10.0, 1.0), (1.0, 1.0, 2.0))
    )
    torch.testing.assert_close(one["loss_cls"], other["loss_cls"])
    torch.testing.assert_close(one["loss_mask"], 10 * other["loss_mask"])
    torch.testing.assert_close(2 * one["loss_box_reg"], other["loss_box_reg"])


@pytest.mark.parametrize("ohem", [True, False])
@pytest.mark.parametrize("proposals", [0, 1, 40])
@pytest.mark.parametrize("objects", [0, 1, 5])
def test_losses_are_finite_for_any_number_of_regions(objects, proposals, ohem):
    heads, features = small(make_heads, ohem=ohem), pyramid()
    losses = losses_of(heads, features, make_proposals(proposals), make_targets(objects))
    assert set(losses) == {"loss_cls", "loss_mask", "loss_box_reg"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    if objects == 0:
        assert losses["loss_mask"] == losses["loss_box_reg"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_an_image_with_500_objects_trains():
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 50, (500, 2), generator=generator).float()
    boxes = torch.cat([low, low + 8], dim=1)
    masks = torch.zeros(500, *SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = True
    target = Instances(SIZE, gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
    target.gt_classes = torch.randint(0, K, (500,), generator=generator)
    heads = small(make_heads)
    losses = losses_of(heads, pyramid(1), make_proposals(300, 1), [target])
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


# ----------------------------------------------------------------------------------- inference


@torch.no_grad()
def test_pool_holds_proposals_then_refined_boxes_each_with_its_own_scores():
    heads = small(make_heads, min_size_test=0.0).eval()
    features, proposals = pyramid(), make_proposals(9)
    first, both = heads.predict_stages(features, proposals)
    maps = heads.score_maps(features)
    boxes = [p.proposal_boxes for p in proposals]
    refined = heads._refined(boxes, heads.score_regions(maps, boxes).deltas, [SIZE, SIZE])
    for image in range(2):
        assert len(first[image]) == 9 and len(both[image]) == 18
        assert torch.equal(both[image].pred_boxes.tensor[:9], boxes[image].tensor)
        torch.testing.assert_close(both[image].pred_boxes.tensor[9:], refined[image].tensor)
        alone = heads.score_regions(ScoreMaps(*(m[image : image + 1] for m in maps)),
                                    [refined[image]])  # fmt: skip
        torch.testing.assert_close(both[image].class_probs[9:], alone.logits.softmax(dim=1)[:, :K])
        torch.testing.assert_close(both[image].pred_masks[9:], alone.seg.softmax(dim=1)[:, 1:])
    without = small(make_heads, refine=False, min_size_test=0.0).eval()
    assert [len(x) for x in without.candidates(features, proposals)] == [9, 9]


@torch.no_grad()
def test_small_regions_are_dropped_by_their_size_in_network_pixels():
    heads = small(make_heads, refine=False, min_size_test=16.0).eval()
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 15.9, 40], [10, 10, 40, 25.5], [0, 0, 90, 60]])
    proposals = [Instances(SIZE, proposal_boxes=Boxes(boxes))]
    (pool,) = heads.candidates(pyramid(1), proposals)
    assert torch.equal(pool.pred_boxes.tensor, boxes[[0, 3]])


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_proposals_gives_detections_of_the_right_shapes(count):
    heads = small(make_heads).eval()
    results, losses = heads(None, pyramid(), make_proposals(count))
    assert losses == {}
    for result in results:
        n = len(result)
        assert n <= 100 and (n > 0) == (count > 0)
        assert result.pred_boxes.tensor.shape == (n, 4)
        assert result.pred_masks.shape == (n, 1, 6, 6)
        assert result.scores.shape == result.pred_classes.shape == (n,)


@torch.no_grad()
def test_masks_of_given_boxes_are_those_of_the_given_classes():
    heads = small(make_heads).eval()
    features, proposals = pyramid(), make_proposals(5)
    maps = heads.score_maps(features)
    given = [Instances(SIZE, pred_boxes=p.proposal_boxes) for p in proposals]
    for x in given:
        x.pred_classes = torch.tensor([0, 1, 0, 1, 1])
    results = heads.forward_with_given_boxes(features, given)
    cells = ps_roi_assemble(
        maps.score, boxes_to_rois([p.proposal_boxes for p in proposals], inclusive=True),
        1 / 16, 3, 6, inclusive=True,
    ).view(2, 5, K + 1, 2, 6, 6)  # fmt: skip
    for image, result in enumerate(results):
        for row, cls in enumerate(result.pred_classes):
            expected = (cells[image, row, cls, 1] - cells[image, row, cls, 0]).sigmoid()
            torch.testing.assert_close(result.pred_masks[row, 0], expected)


def test_impossible_arguments_are_refused():
    with pytest.raises(UserError, match="OUT_SIZE 6 must be at least GROUP_SIZE 7"):
        make_heads(out_size=6)
    with pytest.raises(UserError, match="LOSS_WEIGHTS"):
        make_heads(loss_weights=[1.0, 1.0])
