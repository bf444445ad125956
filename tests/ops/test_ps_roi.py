"""Position-sensitive assembly and mean: naive loops as oracle, gradients, odd inputs."""

import math
import random

import numpy as np
import pytest
import torch

from d2ext.ops import ps_roi_assemble, ps_roi_mean

from tests.ops.helpers import ops, reference, relative_error


def naive(feature, rois, scale, group, size, inclusive):
    """The assembly as loops over numpy float32 bounds."""
    f32 = np.float32
    batch, channels, height, width = feature.shape
    maps = channels // group**2
    out = torch.zeros(len(rois), maps, size, size, dtype=torch.float64)

    def bounds(low, high, length):
        low, high = f32(low), f32(high)
        if inclusive:
            low = f32(math.copysign(math.floor(abs(float(low)) + 0.5), low))
            high = f32(math.copysign(math.floor(abs(float(high)) + 0.5), high)) + f32(1)
        start = low * f32(scale)
        step = max(high * f32(scale) - start, f32(0.1)) / f32(size)
        for p in range(size):
            first = math.floor(f32(p) * step + start)
            last = math.ceil(f32(p + 1) * step + start)
            yield min(max(first, 0), length), min(max(last, 0), length)

    for n, roi in enumerate(rois.tolist()):
        rows = list(bounds(roi[2], roi[4], height))
        columns = list(bounds(roi[1], roi[3], width))
        for d in range(maps):
            for i, (top, bottom) in enumerate(rows):
                for j, (left, right) in enumerate(columns):
                    channel = (d * group + i * group // size) * group + j * group // size
                    block = feature[int(roi[0]), channel, top:bottom, left:right]
                    if block.numel():
                        out[n, d, i, j] = block.double().mean()
    return out


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize(("group", "size"), [(2, 5), (3, 7), (1, 4)])
def test_equals_naive_loops(impl, generator, make_rois, inclusive, group, size):
    feature = torch.randn(2, 3 * group**2, 7, 9, generator=generator)
    rois = make_rois(12, 2, 7 * 16, 9 * 16, margin=0.4)
    arguments = (rois, 1 / 16, group, size)
    options = {"inclusive": inclusive}
    oracle = naive(feature, *arguments, inclusive)
    out = impl.ps_roi_assemble(feature, *arguments, **options)
    torch.testing.assert_close(out.double(), oracle, rtol=1e-5, atol=1e-5)
    mean = impl.ps_roi_mean(feature, *arguments, **options)
    torch.testing.assert_close(mean.double(), oracle.mean((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_a_thousand_random_cases_agree_with_float64(make_rois, mean):
    torch.manual_seed(0)
    name = "ps_roi_mean" if mean else "ps_roi_assemble"
    for seed in range(1000):
        pick = random.Random(seed)
        batch, maps = pick.randint(1, 2), pick.choice([1, 2, 5])
        group, height, width = pick.randint(1, 3), pick.randint(1, 12), pick.randint(1, 12)
        size = group + pick.randint(0, 4)
        scale = pick.choice([1 / 16, 1 / 8, 0.11])
        options = {"inclusive": pick.random() < 0.5}
        dtype, limit = ((torch.float32, 1e-5), (torch.float64, 1e-10))[seed % 2]
        feature = torch.randn(batch, maps * group**2, height, width).to(dtype)
        rois = make_rois(pick.randint(1, 6), batch, height / scale, width / scale, margin=0.3)
        arguments = (rois, scale, group, size)
        oracle = getattr(reference, name)(feature.double(), *arguments, **options)
        found = getattr(ops, name)(feature, *arguments, **options)
        grad = torch.randn(oracle.shape).to(dtype)
        tail = (feature.shape, options["inclusive"])
        arguments = (rois, scale, group, *((size,) if mean else ()), *tail)
        wanted = getattr(reference, f"{name}_backward")(grad.double(), *arguments)
        by_input = getattr(ops, f"{name}_backward")(grad, *arguments)
        if float(oracle.norm()) > 1e-2:
            assert relative_error(found, oracle) < limit * (10 if mean else 1)
        if float(wanted.norm()) > 1e-2:
            assert relative_error(by_input, wanted) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_rounds_once(impl, generator, make_rois, dtype, limit):
    feature = torch.randn(2, 5 * 4, 7, 9, generator=generator).to(dtype)
    rois = make_rois(12, 2, 7 * 16, 9 * 16)
    out = impl.ps_roi_assemble(feature, rois, 1 / 16, 2, 5)
    assert out.dtype == dtype
    oracle = reference.ps_roi_assemble(feature.double(), rois, 1 / 16, 2, 5)
    assert relative_error(out, oracle) < limit
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    arguments = (rois, 1 / 16, 2, feature.shape, False)
    found = impl.ps_roi_assemble_backward(grad, *arguments)
    wanted = reference.ps_roi_assemble_backward(grad.double(), *arguments)
    assert found.dtype == dtype and relative_error(found, wanted) < limit


@pytest.mark.parametrize("kind", [torch.rand, torch.randn])
def test_very_many_bins_of_one_cell_lose_no_accuracy(generator, make_rois, kind):
    """Half a million contributions to one cell; plain sums would be off by 1e-4 and more."""
    rois = make_rois(300, 1, 16, 16, margin=0.0)
    feature, score = torch.ones(1, 4, 1, 1), torch.ones(1, 8, 1, 1)
    by_mean, by_cell, by_mask = (
        kind(*shape, generator=generator)
        for shape in ((300, 4), (300, 4, 40, 40), (300, 2, 40, 40))
    )
    where, picked = (rois, 1 / 16, 1), torch.zeros(300, dtype=torch.int64)
    cases = [
        ("ps_roi_mean", (feature, *where, 40)),
        ("ps_roi_mean_backward", (by_mean, *where, 40, feature.shape, False)),
        ("ps_roi_assemble_backward", (by_cell, *where, feature.shape, False)),
        ("fcis_joint_head_backward", (None, by_mask, score, rois, picked, 1 / 16, 1, 40, False)),
    ]
    for name, args in cases:
        exact = [
            x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
        ]
        found, oracle = getattr(ops, name)(*args), getattr(reference, name)(*exact)
        assert relative_error(found, oracle) < 2e-6, name


@pytest.mark.parametrize("op", [ps_roi_assemble, ps_roi_mean])
def test_gradcheck(make_rois, op):
    feature = torch.randn(2, 2 * 4, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = make_rois(4, 2, 4 * 16, 5 * 16)
    assert torch.autograd.gradcheck(lambda x: op(x, rois, 1 / 16, 2, 3), (feature,))


@pytest.mark.parametrize(("group", "size"), [(7, 7), (7, 21), (7, 23)])
def test_feature_gradient_is_the_adjoint(impl, generator, make_rois, group, size):
    feature = torch.randn(1, 2 * 49, 9, 11, dtype=torch.float64, generator=generator)
    rois = make_rois(6, 1, 9 * 16, 11 * 16)
    out = impl.ps_roi_assemble(feature, rois, 1 / 16, group, size, inclusive=True)
    for grad in (torch.ones_like(out), torch.randn(out.shape, generator=generator).double()):
        by_input = impl.ps_roi_assemble_backward(grad, rois, 1 / 16, group, feature.shape, True)
        scale = float((out * grad).abs().sum())
        assert abs(float((out * grad).sum() - (feature * by_input).sum())) <= 1e-12 * scale


def test_unusable_rows_give_zeros_and_no_gradient(impl, generator):
    nan, inf = float("nan"), float("inf")
    bad = [[0.0, nan, 0, 9, 9], [nan, 0, 0, 9, 9], [0.0, 0, 0, inf, 9], [-1.0, 0, 0, 9, 9]]
    wild = [[0.0, -1e9, -1e9, 1e9, 1e9], [0.0, -3e38, -3e38, 3e38, 3e38], [0.0, 9, 9, 3, 3]]
    rois = torch.tensor([*bad, [1.0, 0, 0, 9, 9], *wild])
    feature = torch.randn(1, 4, 5, 6, generator=generator)
    out = impl.ps_roi_assemble(feature, rois, 1.0, 2, 4)
    assert torch.isfinite(out).all() and not out[:5].any() and out[5].any()
    grad = torch.ones_like(out)
    whole = impl.ps_roi_assemble_backward(grad, rois, 1.0, 2, feature.shape, False)
    good = impl.ps_roi_assemble_backward(grad[5:], rois[5:], 1.0, 2, feature.shape, False)
    torch.testing.assert_close(whole, good)
    assert not impl.ps_roi_mean(feature, rois, 1.0, 2, 4)[:5].any()


@pytest.mark.parametrize("shape", [(0, 8, 4, 5), (2, 8, 4, 5), (2, 0, 4, 5)])
def test_nothing_in_gives_nothing_out(impl, shape):
    feature, rois = torch.randn(shape), torch.zeros(0, 5)
    out = impl.ps_roi_assemble(feature, rois, 1.0, 2, 4)
    assert out.shape == (0, shape[1] // 4, 4, 4)
    by_input = impl.ps_roi_assemble_backward(out, rois, 1.0, 2, shape, False)
    assert by_input.shape == shape and not by_input.any()
    mean = impl.ps_roi_mean(feature, rois, 1.0, 2, 4)
    assert mean.shape == (0, shape[1] // 4)
    by_input = impl.ps_roi_mean_backward(mean, rois, 1.0, 2, 4, shape, False)
    assert by_input.shape == shape and not by_input.any()


def test_strides_and_layouts_do_not_matter(impl, generator, make_rois):
    feature = torch.randn(2, 12, 7, 9, generator=generator)
    rois = make_rois(5, 2, 7 * 16, 9 * 16)
    plain = impl.ps_roi_assemble(feature, rois, 1 / 16, 2, 5)
    last = feature.to(memory_format=torch.channels_last)
    out = impl.ps_roi_assemble(last, rois, 1 / 16, 2, 5)
    assert torch.equal(out, plain)
    assert out.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 24, 7, 9)[:, ::2].copy_(feature)
    assert torch.equal(impl.ps_roi_assemble(strided, rois, 1 / 16, 2, 5), plain)
    arguments = (rois, 1 / 16, 2, feature.shape, False)
    ones = impl.ps_roi_assemble_backward(torch.ones_like(plain), *arguments)
    expanded = torch.ones(()).expand_as(plain)
    assert torch.equal(impl.ps_roi_assemble_backward(expanded, *arguments), ones)


@pytest.mark.parametrize("op", [ps_roi_assemble, ps_roi_mean])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 7, 4, 5)}, "channels of input must be a multiple of 4"),
        ({"input": torch.zeros(8, 4, 5)}, "input must have 4 dimensions, got 3"),
        ({"rois": torch.zeros(2, 5).bfloat16()}, "half precision cannot hold pixel coordinates"),
        ({"out_size": 1}, "1 <= group_size <= out_size <= 128"),
        ({"out_size": 129}, "1 <= group_size <= out_size <= 128"),
        ({"group_size": 0}, "1 <= group_size"),
        ({"spatial_scale": float("nan")}, "spatial_scale must be positive"),
    ],
)
def test_wrong_arguments_are_named(op, change, message):
    arguments = {
        "input": torch.zeros(1, 8, 4, 5),
        "rois": torch.zeros(2, 5),
        "spatial_scale": 1.0,
        "group_size": 2,
        "out_size": 4,
    }
    with pytest.raises(RuntimeError, match=message):
        op(**(arguments | change))


def test_gradient_that_does_not_fit_is_refused(impl):
    rois = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match="does not fit"):
        impl.ps_roi_assemble_backward(torch.zeros(2, 3, 4, 4), rois, 1.0, 2, [1, 8, 4, 5], False)
