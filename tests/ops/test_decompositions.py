"""The operators in standard operators give what the operators give."""

import pytest
import torch

from d2ext import ops
from d2ext.ops import MaskVoting, decompositions

SIZE = (37, 53)


def boxes(count, size, seed=0, least=0.5):
    """Boxes (count, 4), some of them partly outside of an image of (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    low = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 1.2 - 4
    sides = least + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) / 2
    return torch.cat([low, low + sides], dim=1)


def rois(count, size, unusable=False):
    """The same with an image index; of unusable ones NaN, turned and without extent."""
    result = torch.cat([torch.zeros(count, 1), boxes(count, size)], dim=1)
    if unusable:
        result[1, 2], result[2, 3], result[3, 3:] = torch.nan, -8.0, result[3, 1:3]
    return result


@pytest.mark.parametrize("border", ["clamp_half", "zeros"])
@pytest.mark.parametrize(("aligned", "quantize"), [(True, False), (False, False), (False, True)])
def test_roi_warps_of_one_image(border, aligned, quantize):
    x = torch.randn(1, 5, 9, 13)
    options = {"aligned": aligned, "quantize": quantize, "border": border}
    for form, op in (
        (decompositions.roi_warp_form, ops.roi_warp),
        (decompositions.roi_warp_max_pool_form, ops.roi_warp_max_pool),
    ):
        regions = rois(40, SIZE, unusable=True)
        got = form(x, regions, 0.25, 6, 7, **options)
        torch.testing.assert_close(got, op(x, regions, (6, 7), 0.25, **options), atol=2e-5, rtol=0)
        assert got.abs().max() > 1


def test_roi_warp_of_a_map_of_one_cell():
    x, regions = torch.randn(1, 2, 1, 1), rois(8, (16, 16))
    expected = ops.roi_warp(x, regions, 4, 1 / 16)
    torch.testing.assert_close(decompositions.roi_warp_form(x, regions, 1 / 16, 4, 4), expected)


@pytest.mark.parametrize(("sampling_ratio", "average"), [(0, 1), (2, 1), (0, 2)])
def test_pyramid_roi_align_of_one_and_of_several_levels(sampling_ratio, average):
    maps = [torch.randn(1, 3, 96 // 2**i, 128 // 2**i) for i in range(4)]
    scales = [0.25, 0.125, 0.0625, 0.03125]
    regions = rois(60, (384, 512))
    regions[:20, 3:] = regions[:20, 1:3] + 12  # for the finest level
    options = {"sampling_ratio": sampling_ratio, "average": average}
    for levels in (1, 4):
        arguments = (maps[:levels], regions)
        got = decompositions.pyramid_roi_align_form(*arguments, scales[:levels], 6, 4, **options)
        expected = ops.pyramid_roi_align(*arguments, (6, 4), scales[:levels], **options)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("inclusive", [True, False])
def test_position_sensitive_operators(inclusive):
    x, regions = torch.randn(1, 4 * 2 * 9, 11, 14), rois(30, SIZE, unusable=True)
    arguments = (0.25, 3, 7)
    for name in ("ps_roi_assemble", "ps_roi_mean"):
        got = getattr(decompositions, f"{name}_form")(x, regions, *arguments, inclusive=inclusive)
        expected = getattr(ops, name)(x, regions, *arguments, inclusive=inclusive)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for pick in (None, torch.randint(-1, 5, (30,))):
        got = decompositions.fcis_joint_head_form(x, regions, *arguments, pick, inclusive=inclusive)
        expected = ops.fcis_joint_head(x, regions, *arguments, pick, inclusive=inclusive)
        for own, other in zip(got, expected):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(14, 14), (5, 9), (50, 45)])
def test_mask_resize_and_gate(size):
    masks = torch.rand(6, 1, 21, 21)
    got = decompositions.mask_resize_form(masks, *size)
    torch.testing.assert_close(got, ops.mask_resize(masks, size), atol=1e-6, rtol=0)
    features = torch.randn(6, 4, *size)
    got = decompositions.mask_gate_form(features, masks)
    torch.testing.assert_close(got, ops.mask_gate(features, masks), atol=1e-5, rtol=0)


def candidates(count, size, classes=3):
    """Boxes in groups that overlap, with smooth masks and scores."""
    generator = torch.Generator().manual_seed(4)
    centers = boxes(5, size, seed=2, least=10).clamp(min=0)[torch.arange(count) % 5]
    moved = centers + 2 * torch.randn(count, 4, generator=generator)
    last = torch.tensor([size[1] - 1.0, size[0] - 1.0]).repeat(2)
    found = torch.minimum(moved.clamp(min=0), last)
    found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2])
    ramp = torch.linspace(-1, 1, 21)
    radius = ramp[:, None] ** 2 + ramp[None] ** 2
    masks = torch.sigmoid(
        6 * (0.8 - radius) + 0.3 * torch.randn(count, 21, 21, generator=generator)
    )
    scores = torch.rand(count, classes, generator=generator)
    return found, masks, scores / scores.sum(1, keepdim=True)


@pytest.mark.parametrize("mode", ["fcis", "mnc", "crop"])
@pytest.mark.parametrize("max_per_image", [100, 7])
def test_mask_voting(mode, max_per_image):
    found, masks, scores = candidates(40, SIZE)
    voting = MaskVoting(mode=mode, max_per_image=max_per_image, score_threshold=0.1)
    got = decompositions.mask_voting_form(voting, found, masks, scores, SIZE)
    expected = voting(found, masks, scores, SIZE)
    assert len(expected.boxes) > 4
    for own, other in zip(got, expected):
        torch.testing.assert_close(own.to(other.dtype), other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["fcis", "mnc", "crop"])
def test_a_vote_that_nothing_reaches_is_one_pixel_in_the_middle(mode):
    found, masks, _ = candidates(6, SIZE)
    low = masks * 0.1
    lists = (torch.arange(6).int(), torch.tensor([0, 3, 6]).int(), torch.full((6,), 1 / 3))
    voted, tight = ops.mask_vote(low, found, *lists, SIZE, mode=mode)
    weights = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]) / 3
    own, box = decompositions.mask_vote_form(low, found, weights, SIZE, 0.4, mode)
    assert torch.equal(box, tight.float())
    torch.testing.assert_close(own, voted, atol=1e-5, rtol=0)


def test_best_rows_leave_out_what_is_minus_infinity():
    scores = torch.tensor([0.1, -torch.inf, 0.7, 0.3])
    assert decompositions.best_rows(scores, 2).tolist() == [2, 3]
    assert decompositions.best_rows(scores, 9).tolist() == [2, 3, 0]
    assert decompositions.best_rows(scores[:0], 9).tolist() == []


def test_every_operator_of_a_prediction_has_a_form():
    forms = decompositions.decompositions()
    names = {op._schema.name.removeprefix("d2ext::") for op in forms}
    forward = {name for name in ops._library.operators() if not name.endswith("_backward")}
    # Drawing is done outside of exported programs, and voting has a form without lists.
    assert forward - names == {"paste_masks", "mask_vote"}
    with pytest.raises(NotImplementedError, match="edge_max"):
        decompositions.roi_warp_form(torch.zeros(1, 1, 4, 4), rois(5, SIZE), 0.25, 2, 2,
                                bin_reduce="edge_max")  # fmt: skip
