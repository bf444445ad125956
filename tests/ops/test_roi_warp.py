"""RoI warp: independent oracles, gradients, random cases, odd inputs."""

import random

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from d2ext.ops import roi_warp, roi_warp_max_pool

from tests.ops.helpers import ops, reference, relative_error

OPTIONS = [
    {},
    {"aligned": False},
    {"aligned": False, "quantize": True},
    {"border": "zeros"},
    {"bin_reduce": "edge_max"},
    {"aligned": False, "quantize": True, "bin_reduce": "edge_max"},
]


def ordered(options):
    """Keyword options of roi_warp as the positional ones of its backward operator."""
    return (
        options.get("aligned", True), options.get("quantize", False),
        options.get("border", "clamp_half"), options.get("bin_reduce", "point"),
    )  # fmt: skip


def folded_grid_sample(input, rois, scale, size, aligned):
    """The corner- or centre-sampled warp by `grid_sample`; differentiable in both."""
    height, width = input.shape[2:]
    out = []
    for roi in rois:
        image = input[int(roi[0])][None]
        shift = 0.5 if aligned else 0.0
        axes = []
        for low, high, bins, length in (
            (roi[1], roi[3], size[1], width),
            (roi[2], roi[4], size[0], height),
        ):
            place = torch.arange(bins, dtype=rois.dtype) + shift
            start, extent = low * scale, ((high - low) * scale).clamp(min=0)
            axes.append((start + extent * place / bins - shift, length))
        grids = [2 * u / max(length - 1, 1) - 1 for u, length in axes]
        grid = torch.stack([grids[0][None].expand(size), grids[1][:, None].expand(size)], -1)[None]
        value = F.grid_sample(image, grid, padding_mode="border", align_corners=True)[0]
        for (u, length), dim in zip(axes, (2, 1), strict=True):
            inside = ((u >= -0.5) & (u <= length - 0.5)).to(value.dtype)
            value = value * (inside[None, None, :] if dim == 2 else inside[None, :, None])
        out.append(value)
    return torch.stack(out)


@pytest.mark.parametrize("aligned", [False, True])
def test_equals_grid_sample_with_all_gradients(impl, generator, make_rois, aligned):
    feature = torch.randn(2, 5, 9, 13, dtype=torch.float64, generator=generator)
    rois = make_rois(40, 2, 9 * 16, 13 * 16, torch.float64)
    grad = torch.randn(40, 5, 4, 6, dtype=torch.float64, generator=generator)
    feature.requires_grad_()
    rois.requires_grad_()
    oracle = folded_grid_sample(feature, rois, 1 / 16, (4, 6), aligned)
    by_feature, by_rois = torch.autograd.grad(oracle, (feature, rois), grad)
    options = ordered({"aligned": aligned})
    with torch.no_grad():
        out = impl.roi_warp(feature, rois, 1 / 16, 4, 6, aligned=aligned)
        found = impl.roi_warp_backward(grad, feature, rois, 1 / 16, 4, 6, *options, True, True)
    torch.testing.assert_close(out, oracle.detach())
    torch.testing.assert_close(found[0], by_feature)
    torch.testing.assert_close(found[1], by_rois)


def test_aligned_equals_roi_align_with_one_sample(impl, generator, make_rois):
    feature = torch.randn(2, 20, 19, 17, dtype=torch.float64, generator=generator)
    rois = make_rois(60, 2, 19 * 16, 17 * 16, torch.float64, margin=-0.05)
    out = impl.roi_warp(feature, rois, 1 / 16, 7, 5)
    oracle = roi_align(feature, rois, (7, 5), 1 / 16, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(out, oracle, rtol=1e-12, atol=1e-12)


def test_corner_samples_equal_roi_align_on_boxes_moved_by_half_a_bin(impl, generator, make_rois):
    feature = torch.randn(1, 3, 19, 17, dtype=torch.float64, generator=generator)
    rois = make_rois(200, 1, 19 * 16, 17 * 16, torch.float64, margin=-0.02)
    size = rois[:, 3:] - rois[:, 1:3]
    rois = rois[(size > 16 * 7).all(1)]  # roi_align makes smaller boxes one cell large
    moved = rois.clone()
    half = (rois[:, 3:] - rois[:, 1:3]) / 7 / 2
    moved[:, 1:] -= half.repeat(1, 2)
    oracle = roi_align(feature, moved, 7, 1 / 16, sampling_ratio=1, aligned=False)
    keep = (moved[:, 1:3] > 0).all(1)
    assert keep.sum() > 3
    out = impl.roi_warp(feature, rois, 1 / 16, 7, 7, aligned=False)
    torch.testing.assert_close(out[keep], oracle[keep], rtol=1e-12, atol=1e-12)


def random_case(seed, make_rois):
    pick = random.Random(seed)
    batch, channels = pick.randint(1, 2), pick.choice([1, 3, 16, 17, 33])
    height, width = pick.randint(1, 12), pick.randint(1, 12)
    scale = pick.choice([1 / 16, 1 / 8, 0.11])
    options = {
        "aligned": pick.random() < 0.5,
        "quantize": pick.random() < 0.3,
        "border": pick.choice(["clamp_half", "zeros"]),
    }
    size = (pick.randint(1, 5), pick.randint(1, 5))
    feature = torch.randn(batch, channels, height, width, dtype=torch.float64)
    rois = make_rois(pick.randint(1, 6), batch, height / scale, width / scale, margin=0.3)
    if pick.random() < 0.5:
        feature = feature.to(memory_format=torch.channels_last)
    grad = torch.randn(len(rois), channels, *size, dtype=torch.float64)
    return feature, rois, scale, size, options, grad


@pytest.mark.parametrize("name", ["point", "edge_max", "max_pool"])
def test_a_thousand_random_cases_agree_with_float64(make_rois, name):
    torch.manual_seed(0)
    forward, backward = {
        "max_pool": ("roi_warp_max_pool", "roi_warp_max_pool_backward"),
    }.get(name, ("roi_warp", "roi_warp_backward"))
    worst = {torch.float32: 0.0, torch.float64: 0.0}
    # gradients of single cases may nearly cancel: they are measured over all cases together
    squares = {dtype: torch.zeros(2, 2, dtype=torch.float64) for dtype in worst}
    for seed in range(1000):
        feature, rois, scale, size, options, grad = random_case(seed, make_rois)
        dtype = (torch.float32, torch.float64)[seed % 2]
        if dtype == torch.float64:
            rois = rois.double()
        tail = ordered(options)[:3]
        if name != "max_pool":
            options = options | {"bin_reduce": name}
            tail = ordered(options)
        arguments = (rois, scale, *size)
        oracle = getattr(reference, forward)(feature, *arguments, **options)
        data = feature.to(dtype)
        found = getattr(ops, forward)(data, *arguments, **options)
        if float(oracle.norm()) > 1e-3:
            worst[dtype] = max(worst[dtype], relative_error(found, oracle))
        wanted = getattr(reference, backward)(grad, feature, *arguments, *tail, True, True)
        gradients = getattr(ops, backward)(grad.to(dtype), data, *arguments, *tail, True, True)
        for i in range(2):
            squares[dtype][i, 0] += float((gradients[i].double() - wanted[i]).square().sum())
            squares[dtype][i, 1] += float(wanted[i].double().square().sum())
    assert worst[torch.float32] < 1e-5
    assert worst[torch.float64] < 1e-10
    errors = {dtype: (table[:, 0] / table[:, 1]).sqrt().max() for dtype, table in squares.items()}
    assert errors[torch.float64] < 1e-10
    # in float32 the maximum of nearly equal samples may go to the other one
    assert errors[torch.float32] < (1e-5 if name == "point" else 5e-3)


def test_float32_gradients_agree_as_a_whole(generator, make_rois):
    feature = torch.randn(2, 32, 24, 30, generator=generator)
    rois = make_rois(64, 2, 24 * 16, 30 * 16)
    grad = torch.randn(64, 32, 7, 7, generator=generator)
    arguments = (rois, 1 / 16, 7, 7, *ordered({}), True, True)
    found = ops.roi_warp_backward(grad, feature, *arguments)
    oracle = reference.roi_warp_backward(grad.double(), feature.double(), *arguments)
    assert relative_error(found[0], oracle[0]) < 1e-5
    assert relative_error(found[1], oracle[1]) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("pool", [False, True])
def test_half_precision_rounds_once(impl, generator, make_rois, dtype, limit, pool):
    feature = torch.randn(2, 17, 9, 13, generator=generator).to(dtype)
    rois = make_rois(9, 2, 9 * 16, 13 * 16)
    name = "roi_warp_max_pool" if pool else "roi_warp"
    out = getattr(impl, name)(feature, rois, 1 / 16, 4, 6)
    oracle = getattr(reference, name)(feature.double(), rois, 1 / 16, 4, 6)
    assert out.dtype == dtype
    assert relative_error(out, oracle) < limit
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    tail = ordered({})[: 3 if pool else 4]
    found = getattr(impl, f"{name}_backward")(grad, feature, rois, 1 / 16, 4, 6, *tail, True, True)
    wanted = getattr(reference, f"{name}_backward")(
        grad.double(), feature.double(), rois, 1 / 16, 4, 6, *tail, True, True
    )
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert relative_error(found[0], wanted[0]) < limit
    assert relative_error(found[1], wanted[1]) < 1e-3


@pytest.mark.parametrize("options", OPTIONS[:4])
@pytest.mark.parametrize("ones", [False, True])
def test_feature_gradient_is_the_adjoint(impl, generator, make_rois, options, ones):
    feature = torch.randn(2, 17, 9, 13, dtype=torch.float64, generator=generator)
    rois = make_rois(30, 2, 9 * 16, 13 * 16, torch.float64)
    shape = (30, 17, 4, 6)
    grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    if ones:
        grad = torch.ones(shape, dtype=torch.float64)
    out = impl.roi_warp(feature, rois, 1 / 16, 4, 6, **options)
    by_input, _ = impl.roi_warp_backward(
        grad, feature, rois, 1 / 16, 4, 6, *ordered(options), True, False
    )
    left, right = (out * grad).sum(), (feature * by_input).sum()
    assert float((left - right).abs()) <= 1e-12 * float((out * grad).abs().sum())


@pytest.mark.parametrize(
    ("op", "options"),
    [
        *((roi_warp, OPTIONS[i]) for i in (0, 1, 3, 4)),
        *((roi_warp_max_pool, OPTIONS[i]) for i in (0, 1, 3)),
    ],
)
def test_gradcheck_of_features_and_boxes(op, options):
    torch.manual_seed(3)
    feature = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    # the second box ends before it starts
    boxes = torch.tensor(
        [[10.31, 12.77, 90.13, 67.71], [33.17, 1.23, 20.21, 70.9], [3.1, 1.9, 103.3, 64.7]],
        dtype=torch.float64,
        requires_grad=True,
    )
    index = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64)

    def run(feature, boxes):
        return op(feature, torch.cat([index, boxes], 1), (2, 3), 1 / 16, **options)

    assert torch.autograd.gradcheck(run, (feature, boxes))


def test_max_pool_equals_the_doubled_warp_and_pooling(impl, generator, make_rois):
    feature = torch.randn(2, 17, 9, 13, dtype=torch.float64, generator=generator)
    rois = make_rois(30, 2, 9 * 16, 13 * 16, torch.float64)
    fine = impl.roi_warp(feature, rois, 1 / 16, 8, 12).requires_grad_()
    pooled = F.max_pool2d(fine, 2)
    torch.testing.assert_close(impl.roi_warp_max_pool(feature, rois, 1 / 16, 4, 6), pooled)
    grad = torch.randn(pooled.shape, dtype=torch.float64, generator=generator)
    (fine_grad,) = torch.autograd.grad(pooled, fine, grad)
    arguments = (feature, rois, 1 / 16)
    oracle = impl.roi_warp_backward(fine_grad, *arguments, 8, 12, *ordered({}), True, True)
    found = impl.roi_warp_max_pool_backward(grad, *arguments, 4, 6, *ordered({})[:3], True, True)
    torch.testing.assert_close(found[0], oracle[0])
    torch.testing.assert_close(found[1], oracle[1])


@pytest.mark.parametrize("name", ["point", "edge_max", "max_pool"])
@pytest.mark.parametrize("channels", [4, 5])
def test_hundreds_of_boxes_on_one_small_map(impl, generator, make_rois, name, channels):
    pool = name == "max_pool"
    op = "roi_warp_max_pool" if pool else "roi_warp"
    tail = (True, False, "clamp_half", *(() if pool else (name,)), True, True)
    feature = torch.randn(2, channels, 5, 6, dtype=torch.float64, generator=generator)
    rois = make_rois(300, 2, 5 * 16, 6 * 16, torch.float64)
    grad = torch.randn(300, channels, 2, 3, dtype=torch.float64, generator=generator)
    arguments = (grad, feature, rois, 1 / 16, 2, 3, *tail)
    found = getattr(impl, f"{op}_backward")(*arguments)
    oracle = getattr(reference, f"{op}_backward")(*arguments)
    torch.testing.assert_close(found[0], oracle[0])
    torch.testing.assert_close(found[1], oracle[1])


# Where a GPU keeps planes of the map in shared memory: four, two and none of a block.
@pytest.mark.parametrize("height, width", [(38, 63), (50, 84), (70, 91)])
@pytest.mark.parametrize("pool", [False, True])
def test_maps_of_every_size_and_batches_in_any_order(make_rois, height, width, pool):
    torch.manual_seed(0)
    forward = "roi_warp_max_pool" if pool else "roi_warp"
    feature = torch.randn(3, 6, height, width, dtype=torch.float64)
    rois = make_rois(20, 2, height * 16, width * 16, margin=0.2)  # none of the last image
    rois[3, 0], rois[7, 2], rois[11, 0] = 3.0, float("nan"), -1.0
    found = getattr(ops, forward)(feature.float(), rois, 1 / 16, 40, 40)
    wanted = getattr(reference, forward)(feature, rois, 1 / 16, 40, 40)
    assert relative_error(found, wanted) < 1e-5
    assert not found[[3, 7, 11]].any()
    few = getattr(ops, forward)(feature.float(), rois[:2], 1 / 16, 2, 3)  # more cells than bins
    assert relative_error(few, getattr(reference, forward)(feature, rois[:2], 1 / 16, 2, 3)) < 1e-5


def test_memory_may_begin_anywhere(impl, generator, make_rois):
    feature = torch.randn(2, 9, 13, 8, generator=generator).permute(0, 3, 1, 2)
    grad = torch.randn(7, 4, 6, 8, generator=generator).permute(0, 3, 1, 2)
    rois = make_rois(7, 2, 9 * 16, 13 * 16)
    moved = [
        torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
        for x in (feature, grad)
    ]
    assert torch.equal(
        impl.roi_warp(moved[0], rois, 1 / 16, 4, 6), impl.roi_warp(feature, rois, 1 / 16, 4, 6)
    )
    tail = (rois, 1 / 16, 4, 6, *ordered({}), True, True)
    found = impl.roi_warp_backward(moved[1], moved[0], *tail)
    oracle = impl.roi_warp_backward(grad, feature, *tail)
    torch.testing.assert_close(found[0], oracle[0])
    torch.testing.assert_close(found[1], oracle[1])


BAD_ROWS = [
    [0.0, float("nan"), 0.0, 8.0, 8.0],
    [float("nan"), 0.0, 0.0, 8.0, 8.0],
    [0.0, 0.0, 0.0, float("inf"), 8.0],
    [0.0, 0.0, float("-inf"), 8.0, 8.0],
    [-1.0, 0.0, 0.0, 8.0, 8.0],
    [2.0, 0.0, 0.0, 8.0, 8.0],
    [1e9, 0.0, 0.0, 8.0, 8.0],
]
WILD_ROWS = [
    [0.0, -1e9, -1e9, 1e9, 1e9],
    [1.0, 1e9, 1e9, 2e9, 2e9],
    [1.0, -3e38, -3e38, 3e38, 3e38],
    [0.0, 60.0, 60.0, 20.0, 20.0],
    [0.0, 20.0, 20.0, 20.0, 20.0],
    [0.0, -500.0, -500.0, -400.0, -400.0],
]


@pytest.mark.parametrize("options", [*OPTIONS, "pool"])
def test_unusable_rows_give_zeros_and_no_gradient(impl, generator, options):
    name, options = ("roi_warp_max_pool", {}) if options == "pool" else ("roi_warp", options)
    good = [0.0, 3.0, 4.0, 70.0, 60.0]
    rois = torch.tensor([good, *BAD_ROWS, *WILD_ROWS, good])
    feature = torch.randn(2, 17, 6, 8, generator=generator)
    out = getattr(impl, name)(feature, rois, 1 / 16, 3, 2, **options)
    bad = slice(1, 1 + len(BAD_ROWS))
    assert torch.isfinite(out).all()
    assert float(out[bad].abs().max()) == 0
    assert torch.equal(out[0], out[-1]) and float(out[0].abs().max()) > 0
    tail = ordered(options)[: 3 if name.endswith("pool") else 4]
    by_input, by_rois = getattr(impl, f"{name}_backward")(
        torch.ones_like(out), feature, rois, 1 / 16, 3, 2, *tail, True, True
    )
    assert torch.isfinite(by_input).all() and torch.isfinite(by_rois).all()
    assert float(by_rois[bad].abs().max()) == 0
    alone = getattr(impl, f"{name}_backward")(
        torch.ones_like(out)[:1], feature, rois[:1], 1 / 16, 3, 2, *tail, True, True
    )
    torch.testing.assert_close(by_rois[0], alone[1][0])


def test_strides_and_layouts_do_not_matter(impl, generator, make_rois):
    feature = torch.randn(2, 33, 9, 13, generator=generator)
    rois = make_rois(7, 2, 9 * 16, 13 * 16)
    grad = torch.randn(7, 33, 4, 6, generator=generator)
    plain = impl.roi_warp(feature, rois, 1 / 16, 4, 6)
    tail = (rois, 1 / 16, 4, 6, *ordered({}), True, True)
    plain_grads = impl.roi_warp_backward(grad, feature, *tail)
    last = feature.to(memory_format=torch.channels_last)
    strided = torch.randn(2, 66, 9, 13)[:, ::2].copy_(feature)
    for variant in (last, strided):
        out = impl.roi_warp(variant, rois, 1 / 16, 4, 6)
        is_last = variant is last
        assert out.is_contiguous(memory_format=torch.channels_last) == is_last
        torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)
        for upstream in (grad, grad.to(memory_format=torch.channels_last), grad.mT.contiguous().mT):
            found = impl.roi_warp_backward(upstream, variant, *tail)
            assert found[0].is_contiguous(memory_format=torch.channels_last) == is_last
            torch.testing.assert_close(found[0], plain_grads[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[1], plain_grads[1], rtol=1e-4, atol=1e-4)
    expanded = torch.ones(()).expand(7, 33, 4, 6)
    found = impl.roi_warp_backward(expanded, feature, *tail)
    wanted = impl.roi_warp_backward(torch.ones(7, 33, 4, 6), feature, *tail)
    assert torch.equal(found[0], wanted[0])


def test_unneeded_gradients_have_no_elements(impl):
    feature, rois = torch.randn(1, 3, 4, 5), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
    grad = torch.randn(1, 3, 2, 2)
    for need in ((True, False), (False, True)):
        found = impl.roi_warp_backward(grad, feature, rois, 1.0, 2, 2, *ordered({}), *need)
        assert [bool(value.numel()) for value in found] == list(need)


def test_every_output_element_is_written(make_rois):
    feature = torch.ones(2, 17, 9, 13)
    rois = make_rois(50, 2, 9 * 16, 13 * 16, margin=0.5)
    for _ in range(3):
        poison = torch.full((50, 17, 7, 7), float("nan"))
        del poison  # the next allocation of this size likely gets this memory
        assert torch.isfinite(ops.roi_warp(feature, rois, 1 / 16, 7, 7)).all()
