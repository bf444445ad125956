"""Numbers worked out for FCIS, met by the project's own code: what its heads read from score maps,
targets, losses, voting. Classes there start with the background, here they end with it."""

import pytest
import torch
from fvcore.nn import smooth_l1_loss

from d2ext.modeling.regions.boxes import to_continuous, to_inclusive
from d2ext.ops import MaskVoting
from d2ext.projects.fcis.losses import hardest_regions, region_losses, total_losses
from d2ext.projects.fcis.postprocessing import vote_instances
from d2ext.projects.fcis.roi_heads import ScoreMaps
from d2ext.projects.fcis.sampler import RegionSampler

from detectron2.structures import Boxes, Instances

from tests.projects.fcis.helpers import make_config, make_heads

tensor = torch.tensor


def close(value, expected, atol=1e-5):
    expected = tensor(expected, dtype=value.dtype)
    torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=0, atol=atol)


def as_boxes(rois):
    """Rows of image 0, x1, y1, x2, y2 as given there -> boxes of one image."""
    return [Boxes(to_continuous(tensor(rois, dtype=torch.float32)[:, 1:]))]


def maps_of(score, parts=1):
    """Score maps with boxes of zero."""
    return ScoreMaps(score, score.new_zeros(len(score), 4 * parts, *score.shape[2:]))


def pairs_of_cells(assembled):
    """Assembled values (R x K1 x 2 x 2 x 2) as score maps of R images, and their boxes."""
    boxes = [Boxes(tensor([[0.0, 0.0, 2.0, 2.0]])) for _ in assembled]
    return assembled.flatten(1, 2), boxes


def last(classes, dim=1):
    """Class 0, the background, moved to the end."""
    return classes.roll(-1, dims=dim)


# ------------------------------------------------------------------------------------- the head


def test_the_whole_head(vectors):
    inputs, expected = vectors["head_27_end_to_end"]
    group = inputs["group"]
    heads = make_heads(2, group_size=group, out_size=inputs["out_size"])
    score = tensor(inputs["score_map"]).roll(-2 * group * group, dims=1)
    # The release has box maps for the background, too, which it never uses.
    box = tensor(inputs["box_map"])[:, 4 * group * group :]
    scores = heads.score_regions(ScoreMaps(score, box), as_boxes(inputs["rois"]))
    close(scores.logits, last(tensor(expected["cls_score"])).tolist())
    close(scores.logits.softmax(1), last(tensor(expected["cls_prob"])).tolist())
    assert (scores.picked + 1).tolist() == expected["picked_class"]
    close(scores.seg.softmax(1)[:, 1], expected["mask"])
    close(scores.deltas, tensor(expected["bbox_pred"])[:, 4:].tolist())


# --------------------------------------------------------------------------- targets and losses


def labels_of(labels, num_classes):
    return (tensor(labels) - 1) % (num_classes + 1)


def positive_targets(inputs, labels, num_classes):
    """Mask and box targets of the positive rows."""
    positive = labels < num_classes
    masks = tensor(inputs["mask_targets"])[:, 0]
    return masks[positive] == 1, tensor(inputs["bbox_targets"])[positive, 4:]


def test_losses_and_their_gradients(vectors):
    inputs, expected = vectors["loss_11_values_and_grads"]
    heads = make_heads(2, group_size=1, out_size=2, stride=1)
    score, boxes = pairs_of_cells(last(tensor(inputs["assembled"])))
    score.requires_grad_()
    labels = labels_of(inputs["labels"], 2)
    pick = torch.where(labels < 2, labels, -1)
    scores = heads.score_regions(maps_of(score), boxes, pick)
    deltas = tensor(inputs["bbox_pred"])[:, 4:].requires_grad_()
    each = region_losses(
        scores.logits, scores.seg, deltas, labels, *positive_targets(inputs, labels, 2), 1.0
    )
    losses = total_losses(each, torch.arange(3), inputs["loss_weights"], int(inputs["B"]))
    assert losses["loss_cls"].item() == pytest.approx(expected["loss_cls"], abs=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(expected["loss_mask"], abs=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(expected["loss_box"], abs=1e-5)
    sum(losses.values()).backward()
    by_class = score.grad.unflatten(1, (3, 2)).roll(1, dims=1)
    close(by_class, expected["grad_assembled"])
    close(deltas.grad, tensor(expected["grad_bbox_pred"])[:, 4:].tolist())


def test_hardest_regions_are_those_of_largest_weighted_loss(vectors):
    inputs, expected = vectors["ohem_12_pick"]
    labels = labels_of(inputs["labels"], 2)
    each = region_losses(
        last(tensor(inputs["cls_score"])),
        tensor(inputs["seg_pred"]),
        tensor(inputs["bbox_pred"])[:, 4:],
        labels,
        *positive_targets(inputs, labels, 2),
        1.0,
    )
    close(each.cls, expected["loss_cls"])
    close(each.mask, expected["loss_mask"])
    close(each.box, expected["loss_box"])
    weights = inputs["loss_weights"]
    close(sum(w * x for w, x in zip(weights, each)), expected["rank_key"])
    kept = hardest_regions(each, weights, inputs["keep"])
    assert kept.tolist() == expected["kept_in_rank_order"]


def test_regions_not_kept_have_no_part_in_any_loss(vectors):
    """Blanking their targets, as the release does, and leaving them out are the same."""
    inputs, expected = vectors["ohem_12_pick"]
    labels = labels_of(inputs["labels"], 2)
    logits = last(tensor(inputs["cls_score"])).requires_grad_()
    seg = tensor(inputs["seg_pred"]).requires_grad_()
    deltas = tensor(inputs["bbox_pred"])[:, 4:].requires_grad_()
    each = region_losses(logits, seg, deltas, labels, *positive_targets(inputs, labels, 2), 1.0)
    kept = hardest_regions(each, inputs["loss_weights"], inputs["keep"])
    sum(total_losses(each, kept, inputs["loss_weights"], 128).values()).backward()
    blank = tensor(expected["labels_out"]) == -1
    masked = (tensor(expected["mask_targets_out"]) == -1).flatten(1).all(1)
    unweighted = (tensor(expected["bbox_weights_out"]) == 0).all(1)
    for gradient, without in ((logits.grad, blank), (seg.grad, masked), (deltas.grad, unweighted)):
        assert (gradient.flatten(1).abs().sum(1) == 0).tolist() == without.tolist()


def test_box_targets_are_normalised_deltas(vectors):
    inputs, expected = vectors["box_14_encode"]
    rois, gts = (to_continuous(tensor(inputs[name]).float()) for name in ("rois", "gt"))
    deltas = make_heads().box2box_transform.get_deltas(rois, gts)
    close(deltas, expected["normalised"])


def test_boxes_are_refined_without_a_limit_and_clipped(vectors):
    inputs, expected = vectors["box_15_refine"]
    rois = Boxes(to_continuous(tensor(inputs["rois"]).float()))
    deltas = tensor(inputs["bbox_pred"])[:, 4:]
    (refined,) = make_heads()._refined([rois], deltas, [(inputs["im_h"], inputs["im_w"])])
    close(to_inclusive(refined.tensor), expected["clipped"])
    assert make_heads().box2box_transform.scale_clamp == float("inf")


def test_smooth_l1_has_the_betas_of_the_release(vectors):
    inputs, expected = vectors["loss_22_smooth_l1"]
    x = tensor(inputs["x"], dtype=torch.float64)
    model = make_config().MODEL
    for name, beta in (("sigma3", model.RPN.SMOOTH_L1_BETA),
                       ("sigma1", model.ROI_BOX_HEAD.SMOOTH_L1_BETA)):  # fmt: skip
        close(smooth_l1_loss(x, torch.zeros_like(x), beta), expected[name], 1e-7)
    deltas = x.float().view(-1, 1) * tensor([1.0, 0, 0, 0])
    labels = torch.zeros(len(x), dtype=torch.int64)
    each = region_losses(
        torch.zeros(len(x), 2), torch.zeros(len(x), 2, 1, 1), deltas, labels,
        torch.zeros(len(x), 1, 1), torch.zeros(len(x), 4), 1.0,
    )  # fmt: skip
    close(each.box, expected["sigma1"])


def test_all_regions_are_labelled_positives_first(vectors):
    inputs, expected = vectors["targets_23_ohem_sampling"]
    gts = tensor(inputs["gt"])
    target = Instances((40, 40))
    target.gt_boxes = Boxes(to_continuous(gts[:, :4]))
    target.gt_classes = gts[:, 4].long() - 1
    sampler = RegionSampler(num_classes=20, background_iou=inputs["bg_lo"])
    proposals = Boxes(to_continuous(tensor(inputs["rois"])))
    (regions,) = sampler([proposals], [target], "regions")
    # There, ground truths stand behind the proposals; the order within a label has no effect.
    candidates = torch.cat([proposals.tensor, target.gt_boxes.tensor])
    for order in (False, True):
        rows = [i for i in expected["output_order"] if (i >= len(proposals)) == order]
        wanted = {
            i: (label, expected["assigned_gt"][i])
            for i, label in zip(expected["output_order"], expected["labels"])
        }
        own = regions[regions.is_gt == order]
        assert torch.equal(own.proposal_boxes.tensor, candidates[rows])
        labels = [(int(c) + 1) % 21 for c in own.gt_classes]
        assert labels == [wanted[i][0] for i in rows]
        positive = [r for r, label in enumerate(labels) if label]
        assert own.gt_index[positive].tolist() == [wanted[rows[r]][1] for r in positive]
    positive = regions.gt_classes < 20
    assert positive.tolist() == sorted(positive.tolist(), reverse=True)


# ------------------------------------------------------------------------------------ inference


@pytest.mark.parametrize("threshold, name", [(0.5, "keep_thr_05"), (0.3, "keep_thr_03")])
def test_suppression_counts_whole_pixels(vectors, threshold, name):
    inputs, expected = vectors["nms_17_inclusive"]
    heads = make_heads(voting=MaskVoting(nms_threshold=threshold))
    boxes = tensor(inputs["boxes"]).float()
    seeds, _ = heads.voting.choose_seeds(boxes, tensor(inputs["scores"])[:, None])
    assert seeds.tolist() == expected[name]


@pytest.mark.parametrize("mode", ["fcis", "crop"])
@pytest.mark.parametrize("case", ["vote_18_mask_voting", "vote_25_small_boxes"])
def test_masks_are_voted_for_and_pasted(vectors, case, mode):
    inputs, expected = vectors[f"{case}_{'gpu' if mode == 'fcis' else 'cpu'}"]
    size = (inputs["im_h"], inputs["im_w"])
    found = vote_instances(
        tensor(inputs["boxes"]), tensor(inputs["scores"])[:, 1:], tensor(inputs["masks"]), size,
        MaskVoting(mode=mode, score_threshold=1e-3),
    )  # fmt: skip
    results = expected["results"]
    assert len(found) == len(results)
    assert (found.pred_classes + 1).tolist() == [r["cls"] for r in results]
    close(found.scores, [r["score"] for r in results])
    assert to_inclusive(found.pred_boxes.tensor).tolist() == [r["box"] for r in results]
    assert found.pred_masks.shape == (len(results), *size)
    if "pasted_first_result" in expected:
        assert found.pred_masks[0].int().tolist() == expected["pasted_first_result"]
