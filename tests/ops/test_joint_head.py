"""FCIS' joint head: equal to assembly, maximum and mean; gradients; picking; memory."""

import random

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from d2ext.ops import fcis_joint_head, has_native, ps_roi_assemble

from tests.ops.helpers import ops, reference, relative_error


def unfused(score, rois, scale, group, size, pick=None, **options):
    """The head from the assembled tensor, with one winner per pixel."""
    pairs = ps_roi_assemble(score, rois, scale, group, size, **options).unflatten(1, (-1, 2))
    outside, inside = pairs.unbind(2)
    cls_score = torch.where(inside > outside, inside, outside).mean((2, 3))
    if pick is None:
        pick = cls_score[:, :-1].argmax(1)
    picked = pairs[torch.arange(len(rois)), pick.clamp(0, pairs.shape[1] - 1)]
    outlaw = (pick < 0) | (pick >= pairs.shape[1])
    return cls_score, picked.masked_fill(outlaw[:, None, None, None], 0.0), pick


@pytest.mark.parametrize("classes", [2, 8, 11, 21])
@pytest.mark.parametrize("labels", [False, True])
def test_equals_assembly_maximum_and_mean(impl, generator, make_rois, classes, labels):
    score = torch.randn(2, 2 * classes * 9, 7, 9, dtype=torch.float64, generator=generator)
    rois = make_rois(9, 2, 7 * 16, 9 * 16, margin=0.3)
    pick = torch.randint(-1, classes + 1, (9,), generator=generator) if labels else None
    arguments = (rois, 1 / 16, 3, 7, pick)
    score.requires_grad_()
    oracle = unfused(score, *arguments, inclusive=True)
    with torch.no_grad():
        found = impl.fcis_joint_head(score, *arguments, inclusive=True)
    torch.testing.assert_close(found[0], oracle[0].detach())
    torch.testing.assert_close(found[1], oracle[1].detach())
    assert torch.equal(found[2], oracle[2])
    grad_cls = torch.randn(found[0].shape, dtype=torch.float64, generator=generator)
    grad_seg = torch.randn(found[1].shape, dtype=torch.float64, generator=generator)
    for cls, seg in ((grad_cls, grad_seg), (grad_cls, None), (None, grad_seg)):
        outputs = [(oracle[0], cls), (oracle[1], seg)]
        used = [(value, grad) for value, grad in outputs if grad is not None]
        (wanted,) = torch.autograd.grad(
            [value for value, _ in used], score, [grad for _, grad in used], retain_graph=True
        )
        by_score = impl.fcis_joint_head_backward(
            cls, seg, score.detach(), rois, found[2], 1 / 16, 3, 7, True
        )
        torch.testing.assert_close(by_score, wanted)


def test_a_thousand_random_cases_agree_with_float64(make_rois):
    torch.manual_seed(0)
    for seed in range(1000):
        pick = random.Random(seed)
        batch, classes = pick.randint(1, 2), pick.choice([1, 2, 3, 9])
        group, height, width = pick.randint(1, 3), pick.randint(1, 10), pick.randint(1, 10)
        size = group + pick.randint(0, 4)
        scale = pick.choice([1 / 16, 1 / 8, 0.11])
        options = {"inclusive": pick.random() < 0.5}
        dtype, limit = ((torch.float32, 1e-5), (torch.float64, 1e-10))[seed % 2]
        score = torch.randn(batch, 2 * classes * group**2, height, width).to(dtype)
        rois = make_rois(pick.randint(1, 6), batch, height / scale, width / scale, margin=0.3)
        labels = torch.randint(-1, classes + 1, (len(rois),))
        arguments = (rois, scale, group, size, labels)
        oracle = reference.fcis_joint_head(score.double(), *arguments, **options)
        found = ops.fcis_joint_head(score, *arguments, **options)
        for value, target in zip(found[:2], oracle[:2], strict=True):
            if float(target.norm()) > 1e-2:
                assert relative_error(value, target) < limit
        grad_cls, grad_seg = torch.randn_like(found[0]), torch.randn_like(found[1])
        tail = (rois, labels, scale, group, size, *options.values())
        by_score = ops.fcis_joint_head_backward(grad_cls, grad_seg, score, *tail)
        wanted = reference.fcis_joint_head_backward(
            grad_cls.double(), grad_seg.double(), score.double(), *tail
        )
        if float(wanted.norm()) > 1e-2:
            assert relative_error(by_score, wanted) < limit


@pytest.mark.parametrize("use", ["both", "cls", "seg"])
def test_gradcheck(make_rois, use):
    torch.manual_seed(5)
    score = torch.randn(2, 2 * 3 * 4, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = make_rois(4, 2, 4 * 16, 5 * 16)

    def run(score):
        outputs = fcis_joint_head(score, rois, 1 / 16, 2, 3)[:2]
        return outputs if use == "both" else outputs[use == "seg"]

    assert torch.autograd.gradcheck(run, (score,))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_rounds_once(impl, generator, make_rois, dtype, limit):
    score = torch.randn(2, 2 * 5 * 4, 7, 9, generator=generator).to(dtype)
    rois, pick = make_rois(8, 2, 7 * 16, 9 * 16), torch.arange(8) % 5
    found = impl.fcis_joint_head(score, rois, 1 / 16, 2, 5, pick)
    oracle = reference.fcis_joint_head(score.double(), rois, 1 / 16, 2, 5, pick)
    for value, target in zip(found[:2], oracle[:2], strict=True):
        assert value.dtype == dtype and relative_error(value, target) < limit


def test_without_a_foreground_class_nothing_is_picked(impl, make_rois):
    score, rois = torch.randn(1, 2 * 4, 4, 5), make_rois(3, 1, 4, 5)
    _, seg_logit, picked = impl.fcis_joint_head(score, rois, 1.0, 2, 4)
    assert picked.tolist() == [-1] * 3 and not seg_logit.any()


def test_background_is_never_picked_by_score(impl, make_rois):
    score = torch.zeros(1, 3 * 2 * 4, 4, 5)
    score[:, 2 * 2 * 4 :] = 9.0
    score[:, 2 * 4 : 2 * 2 * 4] = 1.0
    cls_score, _, picked = impl.fcis_joint_head(
        score, make_rois(3, 1, 4, 5, margin=-0.2), 1.0, 2, 4
    )
    assert cls_score.argmax(1).tolist() == [2] * 3 and picked.tolist() == [1] * 3


def test_unusable_rows_give_zeros_and_no_gradient(impl, generator):
    nan, inf = float("nan"), float("inf")
    good = [0.0, 0.0, 0.0, 4.0, 3.0]
    bad = [[0.0, nan, 0, 9, 9], [0.0, 0, 0, inf, 9], [-1.0, 0, 0, 9, 9], [1.0, 0, 0, 9, 9]]
    rois = torch.tensor([good, *bad, [0.0, -1e9, -1e9, 1e9, 1e9]])
    score = torch.randn(1, 3 * 2 * 4, 4, 5, generator=generator)
    pick = torch.tensor([1, 1, 1, 1, 1, -5])
    cls_score, seg_logit, picked = impl.fcis_joint_head(score, rois, 1.0, 2, 4, pick)
    assert not cls_score[1:5].any() and not seg_logit[1:].any() and seg_logit[0].any()
    assert torch.equal(picked, pick)
    grads = torch.ones_like(cls_score), torch.ones_like(seg_logit)
    whole = impl.fcis_joint_head_backward(*grads, score, rois, pick, 1.0, 2, 4, False)
    keep = torch.tensor([0, 5])
    alone = impl.fcis_joint_head_backward(
        grads[0][keep], grads[1][keep], score, rois[keep], pick[keep], 1.0, 2, 4, False
    )
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_in_gives_nothing_out(impl, batch):
    score, rois = torch.randn(batch, 3 * 2 * 4, 4, 5), torch.zeros(0, 5)
    cls_score, seg_logit, picked = impl.fcis_joint_head(score, rois, 1.0, 2, 4)
    assert cls_score.shape == (0, 3) and seg_logit.shape == (0, 2, 4, 4) and picked.shape == (0,)
    by_score = impl.fcis_joint_head_backward(
        cls_score, seg_logit, score, rois, picked, 1.0, 2, 4, False
    )
    assert by_score.shape == score.shape and not by_score.any()


def test_channels_last_scores_give_the_same(impl, generator, make_rois):
    score = torch.randn(2, 3 * 2 * 4, 4, 5, generator=generator)
    last = score.to(memory_format=torch.channels_last)
    rois = make_rois(5, 2, 4, 5)
    plain, other = (impl.fcis_joint_head(x, rois, 1.0, 2, 4) for x in (score, last))
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)
    assert other[1].is_contiguous(memory_format=torch.channels_last)
    by_last = impl.fcis_joint_head_backward(
        plain[0], plain[1], last, rois, plain[2], 1.0, 2, 4, False
    )
    assert by_last.is_contiguous(memory_format=torch.channels_last)


def test_unused_outputs_need_no_gradient(make_rois):
    score = torch.randn(1, 3 * 2 * 4, 4, 5, requires_grad=True)
    cls_score, seg_logit, picked = fcis_joint_head(score, make_rois(3, 1, 4, 5), 1.0, 2, 4)
    assert not picked.requires_grad
    (by_cls,) = torch.autograd.grad(cls_score.sum(), score, retain_graph=True)
    (by_seg,) = torch.autograd.grad(seg_logit.sum(), score)
    assert by_cls.any() and by_seg.any()


def allocated(run):
    """Largest sum of live CPU bytes the allocator reports while `run` works."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run()
    del result
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_assembled_tensor_is_never_held(make_rois):
    classes, size, count = 21, 21, 256
    score = torch.randn(1, 2 * classes * 49, 5, 6)
    rois = make_rois(count, 1, 5 * 16, 6 * 16)
    assembled = count * 2 * classes * size * size * 4
    outputs = count * (classes + 2 * size * size + 2) * 4
    used = allocated(lambda: fcis_joint_head(score, rois, 1 / 16, 7, size))
    assert outputs <= used
    if has_native():
        assert used < outputs * 1.2
        grads = torch.randn(count, classes), torch.randn(count, 2, size, size)
        picked = torch.ones(count, dtype=torch.int64)
        used = allocated(
            lambda: torch.ops.d2ext.fcis_joint_head_backward(
                *grads, score, rois, picked, 1 / 16, 7, size, False
            )
        )
        assert used < score.numel() * 4 * 1.1
    else:
        assert used < 8 * assembled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.zeros(1, 12, 4, 5)}, "channels of score must be a multiple of 8"),
        ({"pick": torch.zeros(2)}, "pick must be int64"),
        ({"pick": torch.zeros(3, dtype=torch.int64)}, "pick must be int64"),
        ({"rois": torch.zeros(2, 6)}, r"rois must have shape \(N, 5\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "score": torch.zeros(1, 16, 4, 5),
        "rois": torch.zeros(2, 5),
        "spatial_scale": 1.0,
        "group_size": 2,
        "out_size": 4,
    }
    with pytest.raises(RuntimeError, match=message):
        fcis_joint_head(**(arguments | change))


def test_wrong_gradient_shapes_are_refused(impl):
    score, rois, pick = torch.zeros(1, 16, 4, 5), torch.zeros(2, 5), torch.zeros(2).long()
    for cls, seg, name in (
        (torch.zeros(2, 3), None, "grad_cls"),
        (None, torch.zeros(2, 2, 4, 5), "grad_seg"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must have the shape"):
            impl.fcis_joint_head_backward(cls, seg, score, rois, pick, 1.0, 2, 4, False)
