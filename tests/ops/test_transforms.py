"""The operators under `torch.func`: the gradients of autograd, or one line that refuses."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from d2ext import ops
from d2ext.ops import _library

from tests.ops.test_library import samples

# torch says so where vmap calls an operator entry by entry
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
FORWARD = [name for name in _library.operators() if "backward" not in name]
DIFFERENTIABLE = [name for name in FORWARD if name not in ("paste_masks", "mask_vote")]
LISTS = ("pyramid_roi_align",)  # vmap has no rule for lists of tensors


def scalar_of(name, entry):
    """The sum of squares of a sample call's results by its differentiable inputs, and those."""
    args, kwargs = samples(double=True)[name][entry]
    leaves, structure = tree_flatten(args)
    wanted = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad]

    def function(*inputs):
        values = list(leaves)
        for i, value in zip(wanted, inputs, strict=True):
            values[i] = value
        results = tree_leaves(_library.operator(name)(*tree_unflatten(values, structure), **kwargs))
        return sum(x.square().sum() for x in results if x.is_floating_point())

    return function, [leaves[i].detach() for i in wanted]


CASES = [(name, i) for name in DIFFERENTIABLE for i in range(len(samples()[name]))]


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_grad_and_vmap_of_grad_are_those_of_autograd(name, entry):
    function, inputs = scalar_of(name, entry)
    positions = tuple(range(len(inputs)))
    tracked = [x.clone().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(function(*tracked), tracked)
    found = torch.func.grad(function, positions)(*inputs)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    if name in LISTS:
        return
    scaled = [torch.stack([x, x * 0.5]) if x.numel() else torch.stack([x, x]) for x in inputs[:1]]
    rest = (None,) * (len(inputs) - 1)
    many = torch.func.vmap(torch.func.grad(function), in_dims=(0, *rest))(*scaled, *inputs[1:])
    for i in range(2):
        one = torch.func.grad(function)(scaled[0][i], *inputs[1:])
        torch.testing.assert_close(many[i], one, rtol=1e-12, atol=1e-12)


def test_a_picked_class_that_is_none_and_defaults_left_out_are_completed():
    score = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    rois = torch.tensor([[0, 3.0, 4, 60, 70]])
    head = _library.operator("fcis_joint_head")

    def total(x):
        return head(x, rois, 1 / 16, 2, 4)[1].square().sum()

    tracked = score.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(tracked), tracked)
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(torch.func.grad(total)(score), wanted)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_derivatives_are_refused_in_one_line(name):
    function, inputs = scalar_of(name, 0)
    with pytest.raises(NotImplementedError, match=f"{name} has no forward derivative") as error:
        torch.func.jvp(function, tuple(inputs), tuple(inputs))
    assert "\n" not in str(error.value)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        with pytest.raises(NotImplementedError, match="has no forward derivative"):
            function(*duals)
        function(*inputs)


def test_second_derivatives_are_refused_as_without_transforms():
    function, (feature, rois) = scalar_of("roi_warp", 0)

    def slope(x):
        return torch.func.grad(function)(x, rois).sum()

    with pytest.raises(NotImplementedError, match="roi_warp_backward has no derivative"):
        torch.func.grad(slope)(feature)


def test_voting_is_refused_under_grad_but_not_under_vmap():
    boxes = torch.tensor([[1.0, 2, 6, 6]] * 2)
    index, offset, weight = torch.tensor([0, 1]), torch.tensor([0, 2]), torch.full((2,), 0.5)

    def vote(masks):
        return ops.mask_vote(masks, boxes, index.int(), offset.int(), weight, (9, 9))[0].sum()

    masks = torch.rand(3, 2, 7, 7)
    with pytest.raises(NotImplementedError, match="mask_vote is not differentiable"):
        torch.func.grad(vote)(masks[0])
    found = torch.func.vmap(vote)(masks)
    torch.testing.assert_close(found, torch.stack([vote(x) for x in masks]))
