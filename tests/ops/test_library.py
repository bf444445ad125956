"""What every operator owes PyTorch: opcheck, compile, determinism, fallback, the printed table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from d2ext import ops as d2ops
from d2ext.ops import _library
from d2ext.ops.__main__ import table

ROOT = Path(__file__).resolve().parents[2]
WARP = ("clamp_half", "point")


def samples(double=False):
    """Name -> list of (args, kwargs) that exercise each operator."""
    generator = torch.Generator().manual_seed(7)
    dtype = torch.float64 if double else torch.float32

    def rand(*shape, grad=False):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    feature = rand(2, 17, 5, 6, grad=True)
    last = rand(2, 17, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    rois = torch.tensor([[0, 3.1, 4.2, 60.3, 70.4], [1, 9.1, 2.2, 90.3, 33.4], [1, 5.0, 5, 2, 2]])
    rois = rois.to(dtype)
    moving = rois.clone().requires_grad_()
    none = rois[:0]
    size = (1 / 16, 3, 2)
    score = rand(2, 3 * 2 * 4, 5, 6, grad=True)
    score_last = rand(2, 24, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    ps = (1 / 16, 2, 5)
    pick = torch.tensor([1, -1, 2])
    masks = rand(3, 1, 4, 4, grad=True)
    gated = rand(3, 5, 6, 6, grad=True)
    plain_masks, boxes = rand(3, 4, 4).sigmoid(), rois[:, 1:] / 8
    pyramid = [rand(2, 17, 10, 12, grad=True), rand(2, 17, 5, 6, grad=True)]
    pyramid_last = [
        rand(2, 17, height, width).to(memory_format=torch.channels_last).requires_grad_()
        for height, width in ((10, 12), (5, 6))
    ]
    scales = [1 / 8, 1 / 16]  # boxes on both levels
    canonical = {"canonical_size": 56.0}
    sizes = [2, 17, 10, 12, 5, 6]
    int32 = torch.int32
    candidates = (
        torch.tensor([0, 1, 2], dtype=int32), torch.tensor([0, 2, 2, 3], dtype=int32),
        torch.tensor([0.5, 0.5, 1.0]),
    )  # fmt: skip
    full = (True, False, *WARP, True, True)
    options = {"aligned": False, "quantize": True, "border": "zeros"}
    return {
        "roi_warp": [
            ((feature, moving, *size), {}),
            ((last, moving, *size), options),
            ((feature, none, *size), {}),
            ((feature, moving, *size), {"bin_reduce": "edge_max"}),
        ],
        "roi_warp_backward": [
            ((rand(3, 17, 3, 2), feature.detach(), rois, *size, *full), {}),
            ((rand(3, 17, 3, 2), last.detach(), rois, *size, *full[:-1], False), {}),
            ((rand(0, 17, 3, 2), feature.detach(), none, *size, *full), {}),
            ((rand(3, 17, 3, 2), feature.detach(), rois, *size, *full[:-2], False, False), {}),
        ],
        "roi_warp_max_pool": [
            ((feature, moving, *size), {}),
            ((last, moving, *size), options),
            ((feature, none, *size), {}),
        ],
        "roi_warp_max_pool_backward": [
            ((rand(3, 17, 3, 2), feature.detach(), rois, *size, *full[:3], True, True), {}),
            ((rand(3, 17, 3, 2), last.detach(), rois, *size, *full[:3], False, True), {}),
            ((rand(3, 17, 3, 2), feature.detach(), rois, *size, *full[:3], False, False), {}),
        ],
        "pyramid_roi_align": [
            ((pyramid, rois, scales, 3, 2), canonical),
            (
                (pyramid_last, rois, scales, 2, 2),
                {**canonical, "sampling_ratio": 2, "average": 2},
            ),
            ((pyramid[:1], rois, scales[:1], 3, 2), {"sampling_ratio": 1}),
            ((pyramid, none, scales, 3, 2), {}),
        ],
        "pyramid_roi_align_backward": [
            ((rand(3, 17, 3, 2), rois, sizes, scales, False, 0, 1, 56.0, 4), {}),
            ((rand(3, 17, 2, 2), rois, sizes, scales, True, 2, 2, 56.0, 4), {}),
            ((rand(0, 17, 3, 2), none, sizes, scales, False, 0, 1, 56.0, 4), {}),
        ],
        "ps_roi_assemble": [
            ((score, rois, *ps), {}),
            ((score_last, rois, *ps), {"inclusive": True}),
            ((score, none, *ps), {}),
        ],
        "ps_roi_assemble_backward": [
            ((rand(3, 6, 5, 5), rois, *ps[:2], score.shape, True), {}),
            ((rand(0, 6, 5, 5), none, *ps[:2], score.shape, True), {}),
        ],
        "ps_roi_mean": [
            ((score, rois, *ps), {}),
            ((score_last, rois, *ps), {"inclusive": True}),
            ((score, none, *ps), {}),
        ],
        "ps_roi_mean_backward": [((rand(3, 6), rois, *ps, score.shape, True), {})],
        "fcis_joint_head": [
            ((score, rois, *ps), {}),
            ((score, rois, *ps, pick), {"inclusive": True}),
            ((score_last, rois, *ps), {}),
            ((score, none, *ps), {}),
        ],
        "fcis_joint_head_backward": [
            (
                (rand(3, 3), rand(3, 2, 5, 5), score.detach(), rois, pick, *ps, False),
                {},
            ),
            ((None, rand(3, 2, 5, 5), score_last.detach(), rois, pick, *ps, True), {}),
            ((None, None, score.detach(), rois, pick, *ps, False), {}),
        ],
        "mask_resize": [((masks, 3, 7), {}), ((masks[:0], 3, 7), {})],
        "mask_resize_backward": [((rand(3, 1, 3, 7), 4, 4), {})],
        "mask_gate": [
            ((gated, masks), {}),
            ((gated.detach().to(memory_format=torch.channels_last).requires_grad_(), masks), {}),
            ((gated[:0], masks[:0]), {}),
        ],
        "mask_gate_backward": [((rand(3, 5, 6, 6), gated.detach(), masks.detach()), {})],
        "paste_masks": [
            ((plain_masks, boxes, 9, 11), {}),
            ((plain_masks, boxes, 9, 11), {"threshold": -1.0}),
            ((plain_masks[:0], boxes[:0], 9, 11), {}),
        ],
        "mask_vote": [
            ((plain_masks, boxes, *candidates, 9, 11), {}),
            ((plain_masks, boxes, *candidates, 9, 11), {"mode": "mnc", "binary_thresh": 0.3}),
            (
                (
                    plain_masks,
                    boxes,
                    candidates[0][:0],
                    candidates[1][:1],
                    candidates[2][:0],
                    9,
                    11,
                ),
                {},
            ),
        ],
    }


CASES = [(name, i) for name, entries in samples().items() for i in range(len(entries))]


def test_every_operator_is_sampled():
    assert set(samples()) == set(_library.operators())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name, case):
    args, kwargs = samples()[name][case]
    results = torch.library.opcheck(getattr(torch.ops.d2ext, name).default, args, kwargs)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("name", [name for name in samples() if "backward" not in name])
def test_compiles_without_a_break_for_any_number_of_rois(name):
    torch._dynamo.reset()
    op = getattr(torch.ops.d2ext, name)

    def total(*args, **kwargs):
        out = op(*args, **kwargs)
        return out if isinstance(out, (tuple, list)) else (out,)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for args, kwargs in samples()[name][:2]:
        eager, traced = total(*args, **kwargs), compiled(*args, **kwargs)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)
        leaves = tree_leaves(args)
        inputs = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        outputs = [(a, b) for a, b in zip(eager, traced, strict=True) if a.requires_grad]
        if outputs:
            wanted = torch.autograd.grad(sum(a.square().sum() for a, _ in outputs), inputs)
            found = torch.autograd.grad(sum(b.square().sum() for _, b in outputs), inputs)
            for a, b in zip(wanted, found, strict=True):
                torch.testing.assert_close(a, b)


def test_number_of_rois_is_symbolic_in_the_shape_functions():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def pooled(feature, rois):
        return d2ops.roi_warp(feature, rois, 3, 1 / 16).sum((1, 2, 3))

    feature = torch.randn(1, 3, 5, 6)
    for count in (2, 3, 5, 9):
        rois = torch.tensor([[0.0, 0.0, 0.0, 40.0, 50.0]]).repeat(count, 1)
        assert pooled(feature, rois).shape == (count,)
    counters = torch._dynamo.utils.counters["stats"]
    assert counters["unique_graphs"] >= 1


@pytest.mark.parametrize("name", list(samples()))
def test_results_are_bitwise_equal_for_any_number_of_threads(name):
    before = torch.get_num_threads()
    try:
        for args, kwargs in samples()[name]:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    out = getattr(torch.ops.d2ext, name)(*args, **kwargs)
                results.append(tree_leaves(out))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_gradients_nobody_wants_have_no_elements():
    """Of all backward operators that say which ones are wanted."""
    asked = 0
    for name, entries in samples().items():
        schema = getattr(torch.ops.d2ext, name).default._schema
        flags = [i for i, x in enumerate(schema.arguments) if x.name.startswith("need_")]
        for args, kwargs in entries if flags else []:
            args = [False if i in flags else value for i, value in enumerate(args)]
            found = getattr(torch.ops.d2ext, name)(*args, **kwargs)
            assert [x.numel() for x in found] == [0, 0]
            asked += 1
    assert asked > 4
    args, _ = samples()["fcis_joint_head_backward"][0]
    assert not torch.ops.d2ext.fcis_joint_head_backward(None, None, *args[2:]).any()


def test_autocast_leaves_coordinates_alone():
    feature, rois = torch.randn(1, 3, 4, 5), torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert d2ops.roi_warp(feature, rois, 2, 1.0).dtype == torch.float32
        assert d2ops.roi_warp(feature.bfloat16(), rois, 2, 1.0).dtype == torch.bfloat16


def test_table_names_every_operator_and_device():
    rows = table()
    assert {row[0] for row in rows} == set(_library.operators())
    kinds = {row[2] for row in rows if row[1] == "cpu"}
    assert kinds == ({"native"} if d2ops.has_native() else {"pytorch"})
    for name in _library.operators():
        assert [row[1] for row in rows if row[0] == name] == ["cpu", "cuda"]


@pytest.mark.parametrize(("files", "key"), [("cpu/*.cpp", "CPU"), ("cuda/*.cu", "CUDA")])
def test_sources_register_a_kernel_for_every_operator(files, key):
    registered = []
    for path in (ROOT / "d2ext/csrc").glob(files):
        _, *parts = path.read_text().split(f"TORCH_LIBRARY_IMPL(d2ext, {key}, library) {{")
        names = [re.findall(r'library\.impl\("(\w+)"', part.partition("}")[0]) for part in parts]
        assert len(names) == 1 and names[0], f"{path} registers nothing"
        registered += names[0]
    assert sorted(registered) == sorted(_library.operators())


def run_python(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_command_prints_why_the_extension_is_off():
    text = run_python("-m", "d2ext.ops", D2EXT_DISABLE_EXT="1")
    assert "switched off by D2EXT_DISABLE_EXT" in text.splitlines()[0]
    assert " native " not in text
    assert "roi_warp_max_pool " in text


def test_results_survive_without_the_extension():
    code = (
        "import torch, d2ext.ops as o; assert not o.has_native(); torch.manual_seed(0);"
        "f = torch.randn(1, 3, 4, 5, requires_grad=True);"
        "r = torch.tensor([[0.0, 0.3, 0.2, 3.1, 2.2]]);"
        "y = o.roi_warp(f, r, 2, 1.0); y.sum().backward();"
        "print(float(y.detach().sum()), float(f.grad.abs().sum()))"
    )
    values = [float(x) for x in run_python("-c", code, D2EXT_DISABLE_EXT="1").split()]
    torch.manual_seed(0)
    feature = torch.randn(1, 3, 4, 5, requires_grad=True)
    out = d2ops.roi_warp(feature, torch.tensor([[0.0, 0.3, 0.2, 3.1, 2.2]]), 2, 1.0)
    out.sum().backward()
    assert values == pytest.approx(
        [float(out.detach().sum()), float(feature.grad.abs().sum())], rel=1e-5
    )
