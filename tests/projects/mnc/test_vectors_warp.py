"""Numbers worked out for the RoI warp, met by the pooler of the network. Their boxes name the first
and last pixels."""

import pytest
import torch

from d2ext.modeling.regions.boxes import to_continuous
from d2ext.utils.testing import as_double as double
from d2ext.utils.testing import assert_numbers as close
from mnc import build_pooler
from mnc.box_transform import exact_boxes

DOUBLE = torch.float64


def warp(feature, rois, size, scale, *, pooled=False, **options):
    """What the network's pooler gives for rows of image, first and last pixel."""
    feature, rois = torch.as_tensor(feature, dtype=DOUBLE), torch.as_tensor(rois, dtype=DOUBLE)
    feature = feature[None, None] if feature.dim() == 2 else feature
    rois = rois[None] if rois.dim() == 1 else rois
    pooler = build_pooler(2 if pooled else 1, 1, scale, **options)
    pooler.operator.output_size = tuple(size)
    boxes = [
        exact_boxes(to_continuous(rois[rois[:, 0] == image, 1:])) for image in range(len(feature))
    ]
    return pooler([feature], boxes)


@pytest.mark.parametrize("name", ["RW1", "RW2", "RW3", "RW5"])
def test_warp_samples_where_the_release_samples(vectors, name):
    inputs = vectors[name]["inputs"]
    found = warp(inputs["feature"], inputs["roi"], inputs["output_size"], inputs["spatial_scale"])
    close(found, vectors[name]["expected"]["output"])


def test_warp_clamps_half_a_cell_outside_and_gives_zero_beyond(vectors):
    inputs, expected = vectors["RW4"]["inputs"], vectors["RW4"]["expected"]["outputs"]
    for case, output in zip(inputs["cases"], expected, strict=True):
        close(warp(inputs["feature"], case["roi"], case["output_size"], 1.0), output)


def test_warp_reads_the_image_of_each_box(vectors):
    inputs, expected = vectors["RW6"]["inputs"], vectors["RW6"]["expected"]["output"]
    found = warp(inputs["feature"], inputs["rois"], inputs["output_size"], 1.0)
    close(found, expected[::-1])  # the vector lists the box of image 1 first


@pytest.mark.parametrize("quantize", [False, True])
def test_warp_rounds_boxes_only_when_asked(vectors, quantize):
    inputs, expected = vectors["RW7"]["inputs"], vectors["RW7"]["expected"]
    found = warp(inputs["feature"], inputs["roi"], inputs["output_size"], 1.0, quantize=quantize)
    close(found, expected[f"output_quantize_{str(quantize).lower()}"])


@pytest.mark.parametrize("border", ["clamp_half", "zeros"])
def test_warp_follows_either_border_rule(vectors, border):
    inputs, expected = vectors["RW8"]["inputs"], vectors["RW8"]["expected"][border]
    for case, output in zip(inputs["cases"], expected, strict=True):
        found = warp(
            inputs["feature"], case["roi"], case["output_size"], 1.0, quantize=False, border=border
        )
        close(found, output)


@pytest.mark.parametrize("case", ["a", "b"])
def test_warp_with_maximum_and_that_of_the_first_release_differ(vectors, case):
    inputs, expected = vectors["RW9"]["inputs"], vectors["RW9"]["expected"]
    feature, roi = inputs[f"feature_{case}"], double(inputs[f"roi_{case}"])
    close(warp(feature, roi, (2, 2), 1.0, pooled=True), expected[f"{case}_warp4_maxpool2"])
    close(warp(feature, roi, (2, 2), 1.0, bin_reduce="edge_max"), expected[f"{case}_binmax2"])


def warp_gradients(inputs):
    feature = double(inputs["feature"])
    feature = (feature[None, None] if feature.dim() == 2 else feature).requires_grad_()
    roi = double(inputs["roi"]).requires_grad_()
    found = warp(
        feature, roi, inputs["output_size"], inputs["spatial_scale"], quantize=inputs["quantize"]
    )
    gradient = double(inputs["grad_output"]).reshape(found.shape)
    return found, *torch.autograd.grad(found, (feature, roi), gradient)


def test_warp_gradients_are_exact(vectors):
    close(warp_gradients(vectors["RB1"]["inputs"])[1], vectors["RB1"]["expected"]["exact"])
    close(warp_gradients(vectors["RB2"]["inputs"])[2], vectors["RB2"]["expected"]["exact"])
    expected = vectors["RB3"]["expected"]
    output, by_feature, by_box = warp_gradients(vectors["RB3"]["inputs"])
    close(output, expected["output"])
    close(by_feature, expected["grad_feature"])
    close(by_box, expected["grad_box"])
    output, _, by_box = warp_gradients(vectors["RB4"]["inputs"])
    close(output, vectors["RB4"]["expected"]["output"])
    close(by_box, vectors["RB4"]["expected"]["right_difference"])
