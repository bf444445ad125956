"""CUDA kernels against the PyTorch implementations, whose oracle is computed in float64 on the CPU.

Skipped where there is no GPU, unless `D2EXT_EMULATED=1` says that the extension at hand has the
CUDA kernels in the place of those of the CPU (tests/ops/emulation): then the same tests run there.
"""

import os

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from d2ext.ops import _library
from d2ext.ops import has_native as extension_loaded

from tests.ops import test_vectors_fcis, test_vectors_mnc
from tests.ops.helpers import reference, relative_error
from tests.ops.test_library import samples

EMULATED = os.environ.get("D2EXT_EMULATED", "0") not in ("", "0")
DEVICE = "cpu" if EMULATED else "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (EMULATED or torch.cuda.is_available()), reason="no GPU"),
]
needs_gpu = pytest.mark.skipif(EMULATED, reason="asks the GPU's allocator")
OPERATORS = _library.operators()
CASES = [(name, i) for name, entries in samples().items() for i in range(len(entries))]
DIFFERENTIABLE = [
    (name, i)
    for name, i in CASES
    if "backward" not in name and name not in ("paste_masks", "mask_vote")
]


def on_device(value):
    if isinstance(value, list):
        return [on_device(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    return value


def run(name, args, kwargs):
    """Results of the kernel on the device, brought back."""
    with torch.no_grad():
        found = getattr(torch.ops.d2ext, name)(*map(on_device, args), **kwargs)
    return [x.cpu() for x in tree_leaves(found)]


def cast(value, dtype):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().to(dtype) if is_float else value


def test_extension_has_cuda_kernels():
    assert extension_loaded()
    for name in OPERATORS:
        assert _library.implementation(name, DEVICE)[0] == "native"
    assert hasattr(torch.ops.d2ext_emulation, "launches") == EMULATED


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_equals_the_pytorch_implementation(name, double, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        for args, kwargs in samples(double)[name]:
            found, again = run(name, args, kwargs), run(name, args, kwargs)
            with torch.no_grad():
                wanted = tree_leaves(getattr(reference, name)(*args, **kwargs))
            for a, b, c in zip(wanted, found, again, strict=True):
                limit = 1e-9 if double else 1e-4
                torch.testing.assert_close(b, a, rtol=limit, atol=limit)
                if deterministic or not name.startswith("pyramid"):
                    assert torch.equal(b, c)
                assert b.stride() == a.stride()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name, case):
    args, kwargs = samples()[name][case]
    op = getattr(torch.ops.d2ext, name).default
    results = torch.library.opcheck(op, tuple(map(on_device, args)), kwargs)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize(("name", "case"), DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(name, case):
    args, kwargs = samples(double=True)[name][case]
    args = tuple(map(on_device, args))
    kwargs = {**kwargs, "quantize": False} if "quantize" in kwargs else kwargs  # has steps
    names = [x.name for x in getattr(torch.ops.d2ext, name).default._schema.arguments]
    tracked = [
        (i, j, x)
        for i, value in enumerate(args)
        for j, x in enumerate(value if isinstance(value, list) else [value])
        if isinstance(x, torch.Tensor) and x.requires_grad
    ]

    def differentiable(*tensors):
        values = [list(value) if isinstance(value, list) else value for value in args]
        for (i, j, whole), tensor in zip(tracked, tensors, strict=True):
            if names[i] == "rois":  # the image index is no coordinate
                tensor = torch.cat([whole.detach()[:, :1], tensor], 1)
            if isinstance(values[i], list):
                values[i][j] = tensor
            else:
                values[i] = tensor
        results = getattr(torch.ops.d2ext, name)(*values, **kwargs)
        return tuple(x for x in tree_leaves(results) if x.is_floating_point())

    inputs = [x[:, 1:] if names[i] == "rois" else x for i, _, x in tracked]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    # additions in any order differ in the last bits
    assert torch.autograd.gradcheck(differentiable, inputs, fast_mode=True, nondet_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_is_rounded_once(name, dtype):
    limit = 2e-3 if dtype == torch.float16 else 1e-2
    coordinates = ("rois", "boxes", "cand_weight")
    names = [x.name for x in getattr(torch.ops.d2ext, name).default._schema.arguments]
    for args, kwargs in samples()[name]:
        half = tuple(
            value if key in coordinates else tree_map(lambda x: cast(x, dtype), value)
            for key, value in zip(names, args, strict=False)
        )
        exact = tuple(
            value if key in coordinates else tree_map(lambda x: cast(x, torch.float64), value)
            for key, value in zip(names, half, strict=False)
        )
        wanted = tree_leaves(getattr(reference, name)(*exact, **kwargs))
        for a, b in zip(wanted, run(name, half, kwargs), strict=True):
            if b.is_floating_point() and b.numel():
                assert b.dtype in (dtype, torch.float32)
                assert relative_error(b, a) < limit
            elif b.dtype != torch.int64:  # masks and their boxes
                torch.testing.assert_close(b, a.to(b.dtype))


def random_calls(seed):
    """Calls of every forward operator with random sizes, boxes and options."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    batch, channels, height, width = number(1, 2), number(1, 40), number(1, 9), number(1, 9)
    count, bins, group = number(1, 6), number(1, 5), number(1, 3)
    corners = torch.rand(count, 4, generator=generator) * 1.4 - 0.2
    corners *= 16 * torch.tensor([width, height, width, height])
    index = torch.randint(batch, (count, 1), generator=generator).float()
    rois = torch.cat([index, corners], 1)
    feature = rand(batch, channels, height, width)
    if number(0, 1):
        feature = feature.to(memory_format=torch.channels_last)
    flags = {"aligned": bool(number(0, 1)), "quantize": bool(number(0, 1))}
    flags["border"] = ("clamp_half", "zeros")[number(0, 1)]
    reduce = {"bin_reduce": ("point", "edge_max")[number(0, 1)]}
    score = rand(batch, 2 * number(1, 5) * group**2, height, width)
    masks = rand(count, 1, number(1, 7), number(1, 7))
    ps = (rois, 1 / 16, group, group + number(0, 4))
    inclusive = {"inclusive": bool(number(0, 1))}
    pyramid = [rand(batch, channels, 2 * height, 2 * width), feature.contiguous()]
    square = torch.rand(count, bins + 1, bins + 1, generator=generator)
    return [
        ("roi_warp", (feature, rois, 1 / 16, bins, number(1, 5)), {**flags, **reduce}),
        ("roi_warp_max_pool", (feature, rois, 1 / 16, bins, number(1, 5)), flags),
        ("ps_roi_assemble", (score, *ps), inclusive),
        ("ps_roi_mean", (score, *ps), inclusive),
        ("fcis_joint_head", (score, *ps), inclusive),
        ("mask_resize", (masks, number(1, 9), number(1, 9)), {}),
        ("mask_gate", (rand(count, channels, bins, bins + 1), masks), {}),
        (
            "pyramid_roi_align", (pyramid, rois, [1 / 8, 1 / 16], bins, bins),
            {"sampling_ratio": number(0, 2), "average": number(1, 2), "canonical_size": 56.0},
        ),
        ("paste_masks", (square, corners, number(1, 40), number(1, 40)), {"threshold": -1.0}),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(8 if EMULATED else 100))
def test_random_calls_agree_with_the_pytorch_implementation(seed):
    for name, args, kwargs in random_calls(seed):
        wanted = tree_leaves(getattr(reference, name)(*args, **kwargs))
        for a, b in zip(wanted, run(name, args, kwargs), strict=True):
            if b.dtype == torch.uint8:
                assert (a.int() - b.int()).abs().max() <= 1, name  # truncated
            elif b.numel():
                # a sample at a border may fall on either side of it
                far = (a - b).abs() > 1e-3 * (1 + a.abs())
                assert far.float().mean() < 0.02, name


class OnDevice:
    """The operators by name, on tensors that are brought to the device and back."""

    def __getattr__(self, name):
        def call(*args, **kwargs):
            found = getattr(torch.ops.d2ext, name)(*tree_map(on_device, args), **kwargs)
            return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, found)

        return call


def arguments_of(function):
    return function.__code__.co_varnames[: function.__code__.co_argcount]


VECTORS = [
    (module, name)
    for module in (test_vectors_mnc, test_vectors_fcis)
    for name, function in vars(module).items()
    if name.startswith("test_") and "impl" in arguments_of(function)
]


def test_vectors_are_met(request):
    """Every test of the worked-out numbers that takes an implementation, on the device."""
    fixtures = {name: request.getfixturevalue(name) for name in ("mnc_vectors", "fcis_vectors")}
    done = 0
    for module, name in VECTORS:
        function = getattr(module, name)
        wanted = arguments_of(function)
        rows = [{}]
        for mark in getattr(function, "pytestmark", []):
            keys, values = mark.args
            keys = [key.strip() for key in keys.split(",")] if isinstance(keys, str) else keys
            values = [value if len(keys) > 1 else (value,) for value in values]
            rows = [{**row, **dict(zip(keys, v, strict=True))} for row in rows for v in values]
        for row in rows:
            given = {"impl": OnDevice(), **fixtures, **row}
            function(**{key: given[key] for key in wanted})
            done += 1
    assert done > 10


@pytest.mark.parametrize("group", [1, 7])
def test_large_maps_and_many_bins(group):
    """Planes beyond shared memory, and more bins per part than a backward tile holds."""
    side = (40, 50) if EMULATED else (150, 170)
    size, count = (40 if group == 1 else 21), (2 if EMULATED else 20)
    score = torch.randn(1, 2 * (1 if EMULATED else 3) * group**2, *side)
    low = torch.rand(count, 2) * 10 * side[0]
    rois = torch.cat([torch.zeros(count, 1), low, low + torch.rand(count, 2) * 10 * side[0]], 1)
    args = (score, rois, 1 / 16, group, size)
    wanted = reference.fcis_joint_head(*args)
    for a, b in zip(wanted, run("fcis_joint_head", (*args, wanted[2]), {}), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    tensors = (torch.randn_like(wanted[0]), torch.randn_like(wanted[1]), score, rois, wanted[2])
    args = (*tensors, 1 / 16, group, size, False)
    (found,) = run("fcis_joint_head_backward", args, {})
    wanted = reference.fcis_joint_head_backward(*args)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_gpu
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


def test_mask_resize_refuses_planes_beyond_32_bits():
    masks = torch.zeros(1, 1, 2, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="mask_resize: masks of 2 x 2 to 65536 x 32768 are too"):
        torch.ops.d2ext.mask_resize(masks, 1 << 16, 1 << 15)
    with pytest.raises(RuntimeError, match="mask_resize: masks of 65536 x 32768 to 2 x 2 are too"):
        torch.ops.d2ext.mask_resize_backward(masks, 1 << 16, 1 << 15)


def test_wild_rows_do_no_harm():
    nan, inf = float("nan"), float("inf")
    rois = torch.tensor(
        [[0, nan, 0, 9, 9], [0, 0, 0, inf, 9], [-1, 0, 0, 9, 9], [7, 0, 0, 9, 9],
         [0, -1e9, -1e9, 1e9, 1e9], [0, -3e38, -3e38, 3e38, 3e38], [0, 50, 50, 3, 3]]
    )  # fmt: skip
    feature = torch.randn(1, 8, 6, 7)
    calls = [
        ("roi_warp", (feature, rois, 1 / 16, 3, 3), {}),
        ("roi_warp_max_pool", (feature, rois, 1 / 16, 3, 3), {}),
        ("ps_roi_assemble", (feature, rois, 1 / 16, 2, 4), {}),
        ("ps_roi_mean", (feature, rois, 1 / 16, 2, 4), {}),
        ("pyramid_roi_align", ([feature], rois, [1 / 16], 3, 3), {"sampling_ratio": 2}),
    ]
    for name, args, kwargs in calls:
        (found,) = run(name, args, kwargs)
        wanted = getattr(reference, name)(*args, **kwargs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # the PyTorch implementation takes one sample per cell of a box, however large
    found = run("pyramid_roi_align", ([feature], rois, [1 / 16], 3, 3), {"sampling_ratio": 0})
    assert torch.isfinite(found[0]).all()
