"""Resize of masks, and the gate: naive loops, gradients, random cases."""

import math
import random

import pytest
import torch

from d2ext.ops import mask_gate, mask_resize

from tests.ops.helpers import ops, reference, relative_error


def naive_resize(mask, out_h, out_w):
    height, width = mask.shape
    out = torch.zeros(out_h, out_w, dtype=torch.float64)
    for i in range(out_h):
        for j in range(out_w):
            v, u = i * height / out_h, j * width / out_w
            if v > height - 0.5 or u > width - 0.5:
                continue
            v, u = min(v, height - 1), min(u, width - 1)
            y, x = math.floor(v), math.floor(u)
            b, a = v - y, u - x
            y1, x1 = min(y + 1, height - 1), min(x + 1, width - 1)
            top = mask[y, x] * (1 - a) + mask[y, x1] * a
            out[i, j] = top * (1 - b) + (mask[y1, x] * (1 - a) + mask[y1, x1] * a) * b
    return out


@pytest.mark.parametrize(
    ("size", "out"), [((21, 21), (14, 14)), ((3, 5), (7, 2)), ((1, 1), (4, 4)), ((4, 4), (9, 11))]
)
def test_resize_equals_naive_loops(impl, generator, size, out):
    masks = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    found = impl.mask_resize(masks, *out)
    for n in range(2):
        for c in range(3):
            torch.testing.assert_close(found[n, c], naive_resize(masks[n, c], *out))


@pytest.mark.parametrize(("size", "out"), [((5, 4), (3, 3)), ((2, 3), (7, 5))])
def test_resize_and_gate_gradcheck(size, out):
    torch.manual_seed(2)
    masks = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 3, *out, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mask_resize(x, out), (masks,))
    assert torch.autograd.gradcheck(mask_gate, (features, masks))


def test_gate_is_multiplication_by_the_resized_mask(impl, generator):
    features = torch.randn(3, 5, 4, 6, generator=generator)
    masks = torch.rand(3, 1, 7, 7, generator=generator)
    grad = torch.randn(3, 5, 4, 6, generator=generator)
    gate = impl.mask_resize(masks, 4, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        data, upstream = (x.contiguous(memory_format=layout) for x in (features, grad))
        out = impl.mask_gate(data, masks)
        assert out.is_contiguous(memory_format=layout)
        torch.testing.assert_close(out, features * gate)
        by_features, by_masks = impl.mask_gate_backward(upstream, data, masks)
        assert by_features.is_contiguous(memory_format=layout)
        torch.testing.assert_close(by_features, grad * gate)
        sums = (grad * features).sum(1, keepdim=True)
        torch.testing.assert_close(by_masks, impl.mask_resize_backward(sums, 7, 7))


def test_a_thousand_random_resizes_and_gates_agree_with_float64():
    torch.manual_seed(0)
    for seed in range(1000):
        pick = random.Random(seed)
        size = (pick.randint(1, 9), pick.randint(1, 9))
        out = (pick.randint(1, 12), pick.randint(1, 12))
        dtype, limit = ((torch.float32, 1e-5), (torch.float64, 1e-10))[seed % 2]
        masks = torch.rand(pick.randint(1, 3), 1, *size).to(dtype)
        features = torch.randn(len(masks), pick.randint(1, 4), *out).to(dtype)
        pairs = [
            (ops.mask_resize(masks, *out), reference.mask_resize(masks.double(), *out)),
            (
                ops.mask_gate(features, masks),
                reference.mask_gate(features.double(), masks.double()),
            ),
            *zip(
                ops.mask_gate_backward(features, features, masks),
                reference.mask_gate_backward(features.double(), features.double(), masks.double()),
                strict=True,
            ),
        ]
        for found, oracle in pairs:
            assert relative_error(found, oracle) < limit


def test_resize_and_gate_of_nothing(impl):
    assert impl.mask_resize(torch.zeros(0, 1, 5, 5), 3, 3).shape == (0, 1, 3, 3)
    features, masks = torch.zeros(2, 0, 3, 3), torch.rand(2, 1, 5, 5)
    assert impl.mask_gate(features, masks).shape == (2, 0, 3, 3)
    by_features, by_masks = impl.mask_gate_backward(features, features, masks)
    assert by_features.shape == features.shape and not by_masks.any()
