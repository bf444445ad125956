"""Numbers worked out for FCIS' operators, met by every implementation."""

import pytest
import torch

from d2ext.ops import MaskVoting
from d2ext.ops.reference import ps_roi

tensor = torch.tensor
ASSEMBLY = [
    "psa_01_identity_bins", "psa_02_overlapping_bins", "psa_03_clip_and_empty", "psa_04_tiny_roi",
    "psa_05_round_half_away",
]  # fmt: skip


def close(value, expected, atol=1e-5):
    expected = tensor(expected, dtype=value.dtype)
    torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ASSEMBLY)
def test_assembly_averages_the_cells_a_bin_touches(impl, fcis_vectors, name):
    inputs, expected = fcis_vectors[name]["inputs"], fcis_vectors[name]["expected"]
    rois = tensor(inputs["rois"], dtype=torch.float32)
    arguments = (rois, inputs["spatial_scale"], inputs["group"], inputs["out_size"])
    feature = tensor(inputs["map"])
    close(impl.ps_roi_assemble(feature, *arguments, inclusive=True), expected["output"])
    means = tensor(expected["output"]).mean((2, 3))
    close(impl.ps_roi_mean(feature, *arguments, inclusive=True), means.tolist(), 1e-4)


@pytest.mark.parametrize("name", [name for name in ASSEMBLY if "04" not in name])
def test_bins_have_the_published_bounds(fcis_vectors, name):
    inputs, expected = fcis_vectors[name]["inputs"], fcis_vectors[name]["expected"]
    if "h_start" not in expected:
        return
    rois = tensor(inputs["rois"], dtype=torch.float32)
    height, width = tensor(inputs["map"]).shape[2:]
    alive = torch.ones(len(rois), dtype=torch.bool)
    for axis, length, low in (("h", height, 2), ("w", width, 1)):
        found = ps_roi.bins(
            rois[:, low], rois[:, low + 2], alive, inputs["spatial_scale"], length,
            inputs["out_size"], True,
        )  # fmt: skip
        first, last = expected[f"{axis}_start"], expected[f"{axis}_end"]
        empty = [start >= end for start, end in zip(first, last, strict=True)]
        for position in range(len(first)):
            if empty[position]:
                assert found.first[0, position] == found.last[0, position]
            else:
                assert found.first[0, position] == first[position]
                assert found.last[0, position] == last[position]


def test_assembly_gradient_spreads_over_the_cells(impl, fcis_vectors):
    vector = fcis_vectors["psa_06_backward"]
    inputs = vector["inputs"]
    grad = tensor(inputs["grad_output"]).view(1, 2, 4, 4)
    rois = tensor(inputs["rois"], dtype=torch.float32)
    by_input = impl.ps_roi_assemble_backward(
        grad, rois, inputs["spatial_scale"], inputs["group"], inputs["map_shape"], True
    )
    close(by_input, vector["expected"]["grad_map"])
    assert float(by_input.sum()) == pytest.approx(vector["expected"]["sum_of_grad"], rel=1e-6)


def test_channels_are_class_side_row_column(impl, fcis_vectors):
    vector = fcis_vectors["psa_07_channel_index"]
    assert ps_roi.part_index(21, 7) == vector["expected"]["group_21_7"]
    assert ps_roi.part_index(4, 2) == vector["expected"]["group_4_2"]
    assert ps_roi.part_index(5, 2) == vector["expected"]["group_5_2"]
    channels = 2 * 81 * 49
    feature = torch.arange(channels, dtype=torch.float32).view(1, -1, 1, 1)
    rois = tensor([[0.0, 0.0, 0.0, 15.0, 15.0]])
    out = impl.ps_roi_assemble(feature, rois, 1 / 16, 7, 21, inclusive=True)[0]
    queries = vector["inputs"]["queries"]
    for (cls, side, row, column), channel in zip(
        queries, vector["expected"]["channels"], strict=True
    ):
        assert out[2 * cls + side, row, column] == channel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bin_bounds_are_those_of_float32(impl, fcis_vectors, dtype):
    vector = fcis_vectors["psa_08_float32_geometry"]
    inputs = vector["inputs"]
    limit, size = inputs["limit"], inputs["out_size"]
    # one part whose cells hold powers of a base: the mean of a bin names its first and last cell
    ramp = torch.arange(limit, dtype=dtype)
    feature = torch.stack([ramp, ramp**2]).view(1, 2, 1, limit).repeat(1, 1, limit, 1)
    for entry in vector["expected"]["per_range"]:
        low, high = entry["range"]
        rois = tensor([[0, low, low, high, high]], dtype=dtype)
        out = impl.ps_roi_assemble(feature, rois, inputs["spatial_scale"], 1, size, inclusive=True)
        for position, (first, last) in enumerate(
            zip(entry["f32_start"], entry["f32_end"], strict=True)
        ):
            cells = ramp[first:last].double()
            assert float(out[0, 0, 0, position]) == pytest.approx(float(cells.mean()), abs=1e-4)
            mean_square = float((cells**2).mean())
            assert float(out[0, 1, 0, position]) == pytest.approx(mean_square, abs=1e-4)


def score_map_of(assembled):
    """A score map and a RoI whose assembly is `assembled` (1, K, 2, 2, 2)."""
    assembled = torch.as_tensor(assembled)
    maps = assembled.shape[1] * 2
    # one cell per output position: group_size 1, a 2x2 map under a two-cell RoI
    return assembled.view(1, maps, 2, 2), tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])


def last(classes):
    """Class 0, the background, moved to the end."""
    return classes.roll(-1, dims=1)


def test_joint_head_scores_and_picks(impl, fcis_vectors):
    vector = fcis_vectors["joint_09_scores"]
    expected = vector["expected"]
    score, rois = score_map_of(last(tensor(vector["inputs"]["assembled"])))
    cls_score, seg_logit, picked = impl.fcis_joint_head(score, rois, 1.0, 1, 2, inclusive=True)
    close(cls_score, last(tensor(expected["cls_score"])).tolist())
    close(cls_score.softmax(1), last(tensor(expected["cls_prob"])).tolist())
    assert picked.tolist() == [expected["picked_class"] - 1]
    close(seg_logit.softmax(1)[0, 1], expected["picked_mask"])
    for cls, mask in enumerate(expected["mask_prob_inside"][0]):
        pick = tensor([(cls - 1) % len(expected["cls_score"][0])])
        logits = impl.fcis_joint_head(score, rois, 1.0, 1, 2, pick, inclusive=True)[1]
        close(logits.softmax(1)[0, 1], mask)


def test_joint_head_gradient_goes_outside_on_ties(impl, fcis_vectors):
    vector = fcis_vectors["joint_10_max_tie_grad"]
    score, rois = score_map_of(vector["inputs"]["assembled"])
    grad = tensor(vector["inputs"]["grad_cls_score"])
    picked = tensor([-1])
    by_score = impl.fcis_joint_head_backward(grad, None, score, rois, picked, 1.0, 1, 2, True)
    close(by_score, vector["expected"]["grad_assembled"])


@pytest.fixture
def voting(impl, monkeypatch):
    def run(masks, boxes, index, offset, weight, image_size, **options):
        return impl.mask_vote(masks, boxes, index, offset, weight, *image_size, **options)

    monkeypatch.setattr("d2ext.ops.mask_voting.mask_vote", run)
    return lambda mode: MaskVoting(mode=mode, score_threshold=1e-3)


@pytest.mark.parametrize("flavour", ["gpu", "cpu"])
@pytest.mark.parametrize("case", ["vote_18_mask_voting", "vote_25_small_boxes"])
def test_voting_follows_both_flavours_of_the_release(voting, fcis_vectors, case, flavour):
    vector = fcis_vectors[f"{case}_{flavour}"]
    inputs = vector["inputs"]
    boxes, scores = tensor(inputs["boxes"]), tensor(inputs["scores"])[:, 1:]
    image_size = (inputs["im_h"], inputs["im_w"])
    result = voting("fcis" if flavour == "gpu" else "crop")(
        boxes, tensor(inputs["masks"]), scores, image_size
    )
    expected = vector["expected"]["results"]
    assert (result.classes + 1).tolist() == [entry["cls"] for entry in expected]
    assert result.seeds.tolist() == [entry["seed_roi"] for entry in expected]
    close(result.scores, [entry["score"] for entry in expected])
    assert result.boxes.tolist() == [entry["box"] for entry in expected]
    close(result.masks, [entry["mask"] for entry in expected])
