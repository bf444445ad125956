"""Numbers worked out for MNC's operators, met by every implementation."""

import pytest
import torch

from d2ext.ops import MaskVoting

tensor = torch.tensor


def feature_of(inputs, key="feature", dtype=torch.float64):
    feature = tensor(inputs[key], dtype=dtype)
    return feature[None, None] if feature.dim() == 2 else feature


def rois_of(roi, dtype=torch.float32):
    roi = tensor(roi, dtype=dtype)
    return roi[None] if roi.dim() == 1 else roi


def warp(impl, inputs, roi=None, **options):
    options = {"aligned": False, "quantize": inputs.get("quantize", True)} | options
    return impl.roi_warp(
        feature_of(inputs), rois_of(inputs["roi"] if roi is None else roi),
        inputs["spatial_scale"], *inputs["output_size"], **options,
    )  # fmt: skip


def close(value, expected, atol=1e-5):
    expected = tensor(expected, dtype=value.dtype)
    torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["RW1", "RW2", "RW3", "RW5"])
def test_warp_samples_where_the_release_samples(impl, mnc_vectors, name):
    vector = mnc_vectors[name]
    close(warp(impl, vector["inputs"]), vector["expected"]["output"])


def test_warp_clamps_half_a_cell_outside_and_gives_zero_beyond(impl, mnc_vectors):
    vector = mnc_vectors["RW4"]
    for case, expected in zip(
        vector["inputs"]["cases"], vector["expected"]["outputs"], strict=True
    ):
        inputs = vector["inputs"] | {"output_size": case["output_size"]}
        close(warp(impl, inputs, case["roi"]), expected)


def test_warp_takes_image_index_and_channels(impl, mnc_vectors):
    vector = mnc_vectors["RW6"]
    close(warp(impl, vector["inputs"], vector["inputs"]["rois"]), vector["expected"]["output"])


@pytest.mark.parametrize("quantize", [False, True])
def test_warp_rounds_boxes_only_when_asked(impl, mnc_vectors, quantize):
    vector = mnc_vectors["RW7"]
    expected = vector["expected"][f"output_quantize_{str(quantize).lower()}"]
    close(warp(impl, vector["inputs"], quantize=quantize), expected)


@pytest.mark.parametrize("border", ["clamp_half", "zeros"])
def test_warp_follows_either_border_rule(impl, mnc_vectors, border):
    vector = mnc_vectors["RW8"]
    for case, expected in zip(vector["inputs"]["cases"], vector["expected"][border], strict=True):
        inputs = vector["inputs"] | {"output_size": case["output_size"]}
        close(warp(impl, inputs, case["roi"], border=border), expected)


@pytest.mark.parametrize("case", ["a", "b"])
def test_warp_then_pool_and_edge_max_differ_as_the_two_releases_do(impl, mnc_vectors, case):
    vector = mnc_vectors["RW9"]
    inputs, expected = vector["inputs"], vector["expected"]
    feature, roi = feature_of(inputs, f"feature_{case}"), rois_of(inputs[f"roi_{case}"])
    options = {"aligned": False, "quantize": True}
    close(impl.roi_warp(feature, roi, 1.0, 4, 4, **options), expected[f"{case}_warp4"])
    pooled = impl.roi_warp_max_pool(feature, roi, 1.0, 2, 2, **options)
    close(pooled, expected[f"{case}_warp4_maxpool2"])
    edge = impl.roi_warp(feature, roi, 1.0, 2, 2, bin_reduce="edge_max", **options)
    close(edge, expected[f"{case}_binmax2"])


def gradients(impl, inputs):
    grad = feature_of(inputs, "grad_output")
    return impl.roi_warp_backward(
        grad, feature_of(inputs), rois_of(inputs["roi"]), inputs["spatial_scale"],
        *inputs["output_size"], False, inputs["quantize"], "clamp_half", "point", True, True,
    )  # fmt: skip


def test_feature_gradient_is_the_whole_transpose(impl, mnc_vectors):
    vector = mnc_vectors["RB1"]
    by_input, _ = gradients(impl, vector["inputs"])
    close(by_input, vector["expected"]["exact"])
    assert by_input.sum() == vector["expected"]["exact_sum"]


def test_box_gradient_passes_straight_through_the_rounding(impl, mnc_vectors):
    vector = mnc_vectors["RB2"]
    close(gradients(impl, vector["inputs"])[1], vector["expected"]["exact"], 1e-4)


def test_gradients_of_two_channels(impl, mnc_vectors):
    vector = mnc_vectors["RB3"]
    inputs, expected = vector["inputs"], vector["expected"]
    close(warp(impl, inputs), expected["output"])
    by_input, by_rois = gradients(impl, inputs)
    close(by_input, expected["grad_feature"])
    close(by_rois, expected["grad_box"])


def test_box_gradient_at_the_border_is_the_right_hand_difference(impl, mnc_vectors):
    vector = mnc_vectors["RB4"]
    close(warp(impl, vector["inputs"]), vector["expected"]["output"])
    close(gradients(impl, vector["inputs"])[1], vector["expected"]["right_difference"])


def test_mask_resize_is_corner_anchored(impl, mnc_vectors):
    vector = mnc_vectors["MR1"]
    mask = feature_of(vector["inputs"], "mask")
    close(impl.mask_resize(mask, 2, 2), vector["expected"]["output"])
    ramp = torch.arange(441.0, dtype=torch.float64).view(1, 1, 21, 21)
    out = impl.mask_resize(ramp, 14, 14)[0, 0]
    for key, value in mnc_vectors["MR2"]["expected"].items():
        if key != "sum":
            row, column = map(int, key.split("_")[1:])
            assert float(out[row, column]) == pytest.approx(value, abs=1e-5)
    assert float(out.sum()) == pytest.approx(mnc_vectors["MR2"]["expected"]["sum"])


def test_mask_resize_gradient_is_the_transpose(impl, mnc_vectors):
    vector = mnc_vectors["MR3"]
    ones = torch.ones(1, 1, *vector["inputs"]["a_out"], dtype=torch.float64)
    close(impl.mask_resize_backward(ones, *vector["inputs"]["a_in"]), vector["expected"]["a"])
    grad = feature_of(vector["inputs"], "b_grad_output")
    close(impl.mask_resize_backward(grad, *vector["inputs"]["b_in"]), vector["expected"]["b"])


def test_gate_multiplies_all_channels_by_one_mask(impl, mnc_vectors):
    inputs, expected = mnc_vectors["MP1"]["inputs"], mnc_vectors["MP1"]["expected"]
    features = tensor(inputs["feature_CHW"], dtype=torch.float64)[None]
    mask = feature_of(inputs, "mask_HW")
    grad = tensor(inputs["grad_output"], dtype=torch.float64)[None]
    close(impl.mask_gate(features, mask), expected["output"])
    by_features, by_mask = impl.mask_gate_backward(grad, features, mask)
    close(by_features, expected["grad_feature"])
    close(by_mask, expected["grad_mask"])


@pytest.fixture
def voting(impl, monkeypatch):
    """MaskVoting in MNC's mode on the implementation under test."""

    def run(masks, boxes, index, offset, weight, image_size, **options):
        return impl.mask_vote(masks, boxes, index, offset, weight, *image_size, **options)

    monkeypatch.setattr("d2ext.ops.mask_voting.mask_vote", run)
    return MaskVoting(mode="mnc")


@pytest.mark.parametrize("name", ["MV1", "MV3"])
def test_voting_follows_mncs_gpu_release(voting, mnc_vectors, name):
    vector = mnc_vectors[name]
    inputs = vector["inputs"]
    scores = tensor(inputs["scores"])[:, 1:]
    result = voting(tensor(inputs["boxes"]), tensor(inputs["masks"]), scores, inputs["im_hw"])
    expected = {
        (entry.get("cls", 1), entry["seed"]): entry for entry in vector["expected"]["results"]
    }
    found = list(zip((result.classes + 1).tolist(), result.seeds.tolist(), strict=True))
    assert set(expected) <= set(found)
    for key, entry in expected.items():
        row = found.index(key)
        assert result.boxes[row].tolist() == entry["box"]
        assert float(result.scores[row]) == pytest.approx(entry["score"])
        close(result.masks[row], entry["mask"], 1e-4)


def test_vote_without_a_pixel_takes_the_centre(impl, mnc_vectors):
    vector = mnc_vectors["MV2"]
    inputs = vector["inputs"]
    masks, boxes = impl.mask_vote(
        tensor(inputs["masks"]), tensor(inputs["boxes"], dtype=torch.float32),
        tensor([0], dtype=torch.int32), tensor([0, 1], dtype=torch.int32), tensor([1.0]),
        *inputs["im_hw"], mode="mnc",
    )  # fmt: skip
    assert boxes.tolist() == [vector["expected"]["box"]]
    close(masks, vector["expected"]["mask"])
