"""Pyramid RoI align: detectron2's ROIPooler as oracle, gradients, random cases, odd inputs."""

import random

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from d2ext.ops import pyramid_roi_align

from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes

from tests.ops.helpers import ops, reference, relative_error

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
DEFAULTS = (224.0, 4)


def make_pyramid(generator, shape=(2, 17, 40, 56), levels=4, dtype=torch.float32):
    batch, channels, height, width = shape
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(levels)]
    return [
        torch.randn(batch, channels, *size, generator=generator).to(dtype).requires_grad_()
        for size in sizes
    ]


def boxes_of_all_sizes(generator, count, batch, height, width):
    """Sides of 2 to 1500 pixels, some partly or wholly outside the image, sorted by image."""
    side = 2 * 750 ** torch.rand(count, 1, generator=generator)
    aspect = 0.3 * 11 ** torch.rand(count, 1, generator=generator)
    size = side * torch.cat([aspect.sqrt(), 1 / aspect.sqrt()], 1)
    limit = torch.tensor([width, height], dtype=torch.float32)
    centre = (torch.rand(count, 2, generator=generator) * 1.4 - 0.2) * limit
    image = torch.randint(batch, (count, 1), generator=generator).float().sort(0).values
    return torch.cat([image, centre - size / 2, centre + size / 2], 1)


def lists_of(rois, batch):
    return [Boxes(rois[rois[:, 0] == i, 1:]) for i in range(batch)]


def sizes_of(features):
    return [*features[0].shape[:2], *(n for f in features for n in f.shape[2:])]


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_equals_the_pooler_of_detectron2_with_all_gradients(impl, generator, levels, ratio):
    features = make_pyramid(generator, levels=levels)
    rois = boxes_of_all_sizes(generator, 90, 2, 160, 224)
    scales = SCALES[:levels]
    oracle = ROIPooler(7, scales, ratio, "ROIAlignV2")(features, lists_of(rois, 2))
    grad = torch.randn(oracle.shape, generator=generator)
    wanted = torch.autograd.grad(oracle, features, grad)
    with torch.no_grad():
        out = impl.pyramid_roi_align(features, rois, scales, 7, 7, sampling_ratio=ratio)
        found = impl.pyramid_roi_align_backward(
            grad, rois, sizes_of(features), scales, False, ratio, 1, *DEFAULTS
        )
    torch.testing.assert_close(out, oracle.detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("ratio", [0, 2])
def test_average_equals_pooling_of_the_finer_bins(impl, generator, ratio):
    features = make_pyramid(generator)
    rois = boxes_of_all_sizes(generator, 60, 2, 160, 224)
    fine = ROIPooler(14, SCALES, ratio, "ROIAlignV2")(features, lists_of(rois, 2))
    oracle = F.adaptive_avg_pool2d(fine, 7)
    grad = torch.randn(oracle.shape, generator=generator)
    wanted = torch.autograd.grad(oracle, features, grad)
    options = {"sampling_ratio": ratio, "average": 2}
    with torch.no_grad():
        out = impl.pyramid_roi_align(features, rois, SCALES, 7, 7, **options)
        found = impl.pyramid_roi_align_backward(
            grad, rois, sizes_of(features), SCALES, False, ratio, 2, *DEFAULTS
        )
    torch.testing.assert_close(out, oracle.detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_boxes_change_their_level_where_those_of_detectron2_do(impl):
    side = torch.tensor([112.0, 224.0, 448.0])
    side = torch.cat(
        [side, *(side + i * 2e-5 for i in (-2, -1, 1, 2)), torch.tensor([1.0, 3000.0])]
    )
    boxes = torch.stack([0 * side, 0 * side, side, side], 1)
    boxes = torch.cat([boxes, boxes * torch.tensor([1, 1, 0.5, 2])])
    wanted = assign_boxes_to_levels([Boxes(boxes)], 2, 5, 224, 4)
    assert set(wanted.tolist()) == {0, 1, 2, 3}
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], 1)
    # maps that hold their own number, larger than every box
    features = [torch.full((1, 1, 6400 >> (i + 2), 3200 >> (i + 2)), float(i)) for i in range(4)]
    found = impl.pyramid_roi_align(features, rois, SCALES, 1, 1, sampling_ratio=2)
    assert torch.equal(found[:, 0, 0, 0], wanted.float())


@pytest.mark.parametrize("last", [False, True])
def test_gradient_is_that_of_finite_differences(generator, last):
    features = make_pyramid(generator, (2, 3, 6, 7), 2, torch.float64)
    if last:
        features = [
            f.detach().to(memory_format=torch.channels_last).requires_grad_() for f in features
        ]
    rois = boxes_of_all_sizes(generator, 5, 2, 48, 56).double()
    rois = torch.cat([rois, torch.tensor([[0, 3.0, 4, 30, 41]], dtype=torch.float64)])
    for ratio, average in ((0, 1), (2, 1), (0, 2)):

        def run(*maps, ratio=ratio, average=average):
            return pyramid_roi_align(
                maps, rois, (3, 2), [1 / 8, 1 / 16], sampling_ratio=ratio, average=average,
                canonical_size=40.0,
            )  # fmt: skip

        assert torch.autograd.gradcheck(run, features)


def test_second_derivatives_are_refused(generator):
    features = make_pyramid(generator, levels=1)
    rois = boxes_of_all_sizes(generator, 3, 2, 160, 224)
    out = pyramid_roi_align(features, rois, 2, [1 / 4])
    (grad,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="pyramid_roi_align_backward has no derivative"):
        grad.sum().backward()


def random_case(seed, generator):
    pick = random.Random(seed)
    levels, batch = pick.choice([1, 1, 2, 3]), pick.randint(1, 2)
    shape = (batch, pick.choice([1, 3, 16, 17, 33]), pick.randint(1, 20), pick.randint(1, 20))
    features = [f.detach() for f in make_pyramid(generator, shape, levels)]
    if pick.random() < 0.5:
        features = [f.to(memory_format=torch.channels_last) for f in features]
    scale = pick.choice([1 / 4, 1 / 16]) if levels > 1 else pick.choice([1 / 8, 0.11])
    scales = [scale / 2**i for i in range(levels)]
    count = pick.randint(1, 9)
    rois = boxes_of_all_sizes(generator, count, batch, shape[2] / scale, shape[3] / scale)
    rois = rois[torch.randperm(count, generator=generator)]
    size = (pick.randint(1, 5), pick.randint(1, 5))
    options = (
        pick.choice([0, 0, 1, 2, 5]),
        pick.choice([1, 1, 2, 3]),
        pick.choice([64.0, 224.0]),
        4,
    )
    grad = torch.randn(count, shape[1], *size, generator=generator)
    return features, rois, scales, size, options, grad


def test_four_hundred_random_cases_agree_with_float64(generator):
    names = ("sampling_ratio", "average", "canonical_size", "canonical_level")
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(400):
        features, rois, scales, size, options, grad = random_case(seed, generator)
        keywords = dict(zip(names, options, strict=True))
        out = ops.pyramid_roi_align(features, rois, scales, *size, **keywords)
        doubles = [f.double() for f in features]
        oracle = reference.pyramid_roi_align(doubles, rois, scales, *size, **keywords)
        assert relative_error(out, oracle) < 2e-5, seed
        last = not out.is_contiguous()
        arguments = (rois, sizes_of(features), scales, last, *options)
        found = ops.pyramid_roi_align_backward(grad, *arguments)
        wanted = reference.pyramid_roi_align_backward(grad.double(), *arguments)
        for a, b in zip(found, wanted, strict=True):
            assert a.stride() == b.stride()
            squares += torch.stack([(a - b).square().sum(), b.square().sum()])
        # the gradient is the transpose of the pooling
        left = (oracle * grad).sum()
        right = sum((f * g).sum() for f, g in zip(doubles, wanted, strict=True))
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    assert squares[0].sqrt() < 1e-5 * squares[1].sqrt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_half_precision_is_computed_in_float32(impl, generator, dtype, last):
    layout = torch.channels_last if last else torch.contiguous_format
    features = [f.detach().to(dtype, memory_format=layout) for f in make_pyramid(generator)]
    rois = boxes_of_all_sizes(generator, 50, 2, 160, 224)
    out = impl.pyramid_roi_align(features, rois, SCALES, 7, 7)
    oracle = impl.pyramid_roi_align([f.float() for f in features], rois, SCALES, 7, 7)
    assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
    assert torch.equal(out, oracle.to(dtype))
    arguments = (rois, sizes_of(features), SCALES, last, 0, 1, *DEFAULTS)
    found = impl.pyramid_roi_align_backward(out, *arguments)
    wanted = impl.pyramid_roi_align_backward(out.float(), *arguments)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


def test_unusable_rows_give_zeros_and_no_gradient(impl, generator):
    nan, inf = float("nan"), float("inf")
    rois = torch.tensor(
        [[0, nan, 0, 9, 9], [0, 0, 0, inf, 9], [nan, 0, 0, 9, 9], [-1, 0, 0, 9, 9],
         [2, 0, 0, 9, 9], [0, 500, 500, 600, 600], [1, -90, 3, -50, 60]]
    )  # fmt: skip
    features = [f.detach() for f in make_pyramid(generator, levels=2)]
    for maps, scales in ((features, SCALES[:2]), (features[:1], SCALES[:1])):
        for ratio in (0, 2):
            out = impl.pyramid_roi_align(maps, rois, scales, 3, 3, sampling_ratio=ratio)
            assert torch.equal(out, torch.zeros_like(out))
            gradients = impl.pyramid_roi_align_backward(
                torch.ones_like(out), rois, sizes_of(maps), scales, False, ratio, 1, *DEFAULTS
            )
            assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("ratio", [0, 2])
def test_turned_and_flat_boxes_are_those_of_detectron2(impl, generator, ratio):
    """With adaptive sampling they have no samples; with a fixed number they are read mirrored."""
    boxes = [[9, 9, 9, 9], [5, 9, 5, 30], [30, 30, 3, 3], [40, 7, 3, 30], [3, 40, 30, 7]]
    rois = torch.tensor([[0, *map(float, box)] for box in boxes])
    feature = make_pyramid(generator, levels=1)[0].detach()
    out = impl.pyramid_roi_align([feature], rois, SCALES[:1], 3, 3, sampling_ratio=ratio)
    if ratio:
        oracle = roi_align(feature, rois, 3, 1 / 4, ratio, aligned=True)
        assert oracle.abs().sum() > 0
        torch.testing.assert_close(out, oracle, rtol=1e-5, atol=1e-5)
    else:  # torchvision fails on boxes turned along one axis
        assert roi_align(feature, rois[:3], 3, 1 / 4, ratio, aligned=True).abs().sum() == 0
        assert out.abs().sum() == 0
    # among several levels, a box of negative area has none
    features = [f.detach() for f in make_pyramid(generator)]
    lists = [Boxes(rois[:, 1:]), Boxes(torch.zeros(0, 4))]
    oracle = ROIPooler(3, SCALES, ratio, "ROIAlignV2")(features, lists)
    out = impl.pyramid_roi_align(features, rois, SCALES, 3, 3, sampling_ratio=ratio)
    torch.testing.assert_close(out, oracle, rtol=1e-5, atol=1e-5)
    assert out[3:].abs().sum() == 0


def test_huge_boxes_cost_no_more_than_their_part_of_the_map(generator):
    rois = torch.tensor(
        [[0, -1e5, -1e5, 1e5, 1e5], [1, -1e9, -1e9, 1e9, 1e9], [0, -3e38, -3e38, 3e38, 3e38],
         [0, -1e6, 10, 50, 60], [1, 10, 20, 1e7, 60]]
    )  # fmt: skip
    features = [f.detach() for f in make_pyramid(generator)]
    for ratio in (0, 2):
        outs = [
            x.pyramid_roi_align(features, rois, SCALES, 7, 7, sampling_ratio=ratio)
            for x in (ops, reference)
        ]
        assert outs[0].isfinite().all()
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    # a constant map is read as that constant by the bin around it, weighed by the samples inside
    ones = [torch.ones_like(f) for f in features]
    out = ops.pyramid_roi_align(ones, rois[:1], SCALES, 7, 7)
    inside = (features[3].shape[2] + 1) * (features[3].shape[3] + 1)
    cells = (2e5 / 32 / 7) ** 2
    assert out[0, 0].sum() == pytest.approx(inside / cells, rel=0.1)


def test_no_boxes_no_images_and_empty_maps(impl):
    none = torch.zeros(0, 5)
    box = torch.tensor([[0.0, 0.0, 0.0, 9.0, 9.0]])
    for shape, rois in (((2, 5, 6, 7), none), ((0, 5, 6, 7), none), ((0, 5, 6, 7), box),
                        ((1, 5, 0, 7), box), ((1, 0, 6, 7), box)):  # fmt: skip
        out = impl.pyramid_roi_align([torch.ones(shape)], rois, [1 / 4], 3, 2)
        assert out.shape == (len(rois), shape[1], 3, 2) and out.sum() == 0
        (gradient,) = impl.pyramid_roi_align_backward(
            torch.ones_like(out), rois, shape, [1 / 4], False, 0, 1, *DEFAULTS
        )
        assert gradient.shape == shape and gradient.sum() == 0


def test_any_strides_are_taken(impl, generator):
    features = [f.detach() for f in make_pyramid(generator)]
    rois = boxes_of_all_sizes(generator, 20, 2, 160, 224)
    oracle = impl.pyramid_roi_align(features, rois, SCALES, 7, 5)
    strided = [torch.stack([f, f], -1)[..., 0] for f in features]
    mixed = [
        f.to(memory_format=torch.channels_last) if i % 2 else f for i, f in enumerate(features)
    ]
    wide = torch.stack([rois, rois], 2)[..., 1]
    for maps in (strided, mixed):
        assert not all(f.is_contiguous() for f in maps) and not wide.is_contiguous()
        assert torch.equal(impl.pyramid_roi_align(maps, wide, SCALES, 7, 5), oracle)
    arguments = (rois, sizes_of(features), SCALES, False, 0, 1, *DEFAULTS)
    spread = torch.ones(1, 1, 1, 1).expand(oracle.shape)
    wanted = impl.pyramid_roi_align_backward(spread.contiguous(), *arguments)
    last = spread.contiguous(memory_format=torch.channels_last)
    for grad in (spread, last):
        for a, b in zip(impl.pyramid_roi_align_backward(grad, *arguments), wanted, strict=True):
            assert torch.equal(a, b)


def test_backward_allocates_the_gradients_and_little_else(generator):
    features = make_pyramid(generator, (1, 32, 160, 224))
    rois = boxes_of_all_sizes(generator, 20, 1, 640, 896)
    out = pyramid_roi_align(features, rois, 7, SCALES)
    grad = torch.ones_like(out)
    with torch.profiler.profile(
        profile_memory=True, acc_events=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        torch.autograd.grad(out, features, grad)
    taken = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert sum(f.numel() * 4 for f in features) <= max(taken) * 1.01
    assert max(taken) < 1.1 * sum(f.numel() * 4 for f in features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "features must not be empty"),
        ({"scales": [1 / 4]}, "1..8 feature levels with a scale each are needed"),
        ({"scales": [1 / 4, 1 / 16]}, "every scale must be half of the one before"),
        ({"scales": [0.3, 0.15]}, "scales of several levels must be powers of two"),
        ({"scales": [-1.0, -0.5]}, "spatial_scale must be positive and finite"),
        ({"rois": torch.zeros(1, 4)}, r"rois must have shape \(N, 5\)"),
        ({"rois": torch.zeros(1, 5).half()}, "rois must be float32"),
        ({"out_h": 0}, "output size times average must lie in 1..256"),
        ({"average": 100}, "output size times average must lie in 1..256"),
        ({"average": 0}, "output size times average must lie in 1..256"),
        ({"sampling_ratio": -1}, "sampling_ratio must lie in 0..64"),
        ({"canonical_size": 0.0}, "canonical_size must be positive and finite"),
        (
            {"features": [torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2, 2)]},
            "images, channels, dtype and device of all feature levels must be equal",
        ),
        ({"features": [torch.zeros(1, 4, 4)] * 2}, "features must have 4 dimensions, got 3"),
    ],
)
def test_wrong_arguments_are_named(impl, change, message):
    arguments = {
        "features": [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)],
        "rois": torch.zeros(1, 5), "scales": [1 / 4, 1 / 8], "out_h": 3, "out_w": 3,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"pyramid_roi_align: {message}"):
        impl.pyramid_roi_align(**{**arguments, **change})
