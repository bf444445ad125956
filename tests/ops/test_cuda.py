"""CUDA kernels against the CPU's, in float64 and float32; skipped where there is no GPU."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from d2ext.ops import _library
from d2ext.ops import has_native as extension_loaded

from tests.ops.test_library import samples

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_gpu(value):
    if isinstance(value, list):
        return [on_gpu(item) for item in value]
    if isinstance(value, torch.Tensor):
        moved = value.detach().cuda()
        return moved.requires_grad_(value.requires_grad)
    return value


def test_extension_has_cuda_kernels():
    assert extension_loaded()
    for name in _library.operators():
        assert _library.implementation(name, "cuda")[0] == "native"


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", _library.operators())
def test_equals_the_cpu(name, double, deterministic):
    op = getattr(torch.ops.d2ext, name)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for args, kwargs in samples(double)[name]:
            with torch.no_grad():
                wanted = op(*args, **kwargs)
                found = op(*map(on_gpu, args), **kwargs)
                again = op(*map(on_gpu, args), **kwargs)
            results = (tree_leaves(x) for x in (wanted, found, again))
            for a, b, c in zip(*results, strict=True):
                limit = 1e-9 if double else 1e-4
                torch.testing.assert_close(b.cpu(), a, rtol=limit, atol=limit)
                if deterministic or not name.startswith("pyramid"):
                    assert torch.equal(b, c)
                assert b.stride() == a.stride()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_half_precision_warp_equals_the_cpu(dtype, last):
    feature = torch.randn(2, 40, 20, 30).to(dtype)
    if last:
        feature = feature.to(memory_format=torch.channels_last)
    low = torch.rand(50, 2) * 200
    rois = torch.cat([torch.randint(2, (50, 1)), low, low + torch.rand(50, 2) * 300], 1).float()
    for name in ("roi_warp", "roi_warp_max_pool"):
        op = getattr(torch.ops.d2ext, name)
        wanted, found = (op(x, r, 1 / 16, 7, 7) for x, r in (
            (feature, rois), (feature.cuda(), rois.cuda()),
        ))  # fmt: skip
        torch.testing.assert_close(found.cpu(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("group", [1, 7])
def test_large_maps_and_many_bins(group):
    """Planes beyond shared memory, and more bins per part than a backward tile holds."""
    size = 40 if group == 1 else 21
    score = torch.randn(1, 2 * 3 * group**2, 150, 170)
    low = torch.rand(20, 2) * 1500
    rois = torch.cat([torch.zeros(20, 1), low, low + torch.rand(20, 2) * 1500], 1)
    op, backward = torch.ops.d2ext.fcis_joint_head, torch.ops.d2ext.fcis_joint_head_backward
    wanted = op(score, rois, 1 / 16, group, size)
    found = op(score.cuda(), rois.cuda(), 1 / 16, group, size, wanted[2].cuda())
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
    tensors = (torch.randn_like(wanted[0]), torch.randn_like(wanted[1]), score, rois, wanted[2])
    a = backward(*tensors, 1 / 16, group, size, False)
    b = backward(*(x.cuda() for x in tensors), 1 / 16, group, size, False)
    torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


def test_head_memory_stays_near_the_gradient_of_the_map():
    score = torch.randn(1, 2 * 21 * 49, 38, 63, device="cuda")
    rois = torch.tensor([[0.0, 0.0, 0.0, 300.0, 400.0]], device="cuda").repeat(300, 1)
    picked = torch.ones(300, dtype=torch.int64, device="cuda")
    grads = torch.randn(300, 21, device="cuda"), torch.randn(300, 2, 21, 21, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.ops.d2ext.fcis_joint_head_backward(*grads, score, rois, picked, 1 / 16, 7, 21, False)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * score.numel() * 4


def test_wild_rows_do_no_harm():
    nan, inf = float("nan"), float("inf")
    rois = torch.tensor(
        [[0, nan, 0, 9, 9], [0, 0, 0, inf, 9], [-1, 0, 0, 9, 9], [7, 0, 0, 9, 9],
         [0, -1e9, -1e9, 1e9, 1e9], [0, -3e38, -3e38, 3e38, 3e38], [0, 50, 50, 3, 3]]
    )  # fmt: skip
    feature = torch.randn(1, 8, 6, 7)
    for name, args in (
        ("roi_warp", (1 / 16, 3, 3)), ("roi_warp_max_pool", (1 / 16, 3, 3)),
        ("ps_roi_assemble", (1 / 16, 2, 4)), ("ps_roi_mean", (1 / 16, 2, 4)),
    ):  # fmt: skip
        op = getattr(torch.ops.d2ext, name)
        found = op(feature.cuda(), rois.cuda(), *args).cpu()
        torch.testing.assert_close(found, op(feature, rois, *args), rtol=1e-4, atol=1e-4)
    op = torch.ops.d2ext.pyramid_roi_align
    for ratio in (0, 2):
        wanted = op([feature], rois, [1 / 16], 3, 3, sampling_ratio=ratio)
        found = op([feature.cuda()], rois.cuda(), [1 / 16], 3, 3, sampling_ratio=ratio).cpu()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
