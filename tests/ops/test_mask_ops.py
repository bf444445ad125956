"""Mask operators: pasting like detectron2, voting like the published loops."""

import math
import random

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image as torchvision_paste

from d2ext.ops import mask_gate, mask_resize, mask_vote, paste_masks

from detectron2.layers.mask_ops import paste_masks_in_image

from tests.ops.helpers import ops, reference


def random_masks(generator, count, size, dtype=torch.float32):
    """Smooth random probabilities."""
    coarse = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return fine[:, 0].to(dtype)


@pytest.fixture
def make_boxes(make_rois):
    return lambda count, height, width, **kw: make_rois(count, 1, height, width, **kw)[:, 1:]


# ------------------------------------------------------------------ paste
def test_pastes_like_detectron2(impl, generator, make_boxes):
    masks, boxes = random_masks(generator, 40, 28), make_boxes(40, 60, 90, margin=0.0)
    boxes[:, 2:] += 1
    found = impl.paste_masks(masks, boxes, 60, 90)
    oracle = paste_masks_in_image(masks, boxes, (60, 90))
    value = impl.paste_masks(masks, boxes, 60, 90, threshold=0.5 - 1e-6) & ~impl.paste_masks(
        masks, boxes, 60, 90, threshold=0.5 + 1e-6
    )
    assert found.dtype == torch.bool
    assert not ((found != oracle) & ~value).any()
    assert 0.02 < float(found.float().mean()) < 0.98


def test_pastes_bytes_like_detectron2(impl, generator, make_boxes):
    masks, boxes = random_masks(generator, 20, 14), make_boxes(20, 40, 50, margin=-0.05)
    boxes[:, 2:] += 2
    found = impl.paste_masks(masks, boxes, 40, 50, threshold=-1.0)
    oracle = paste_masks_in_image(masks, boxes, (40, 50), threshold=-1)
    # detectron2 on the CPU cuts each mask one pixel around its box; inside both are the same rule
    x, y = torch.arange(50) + 0.5, torch.arange(40) + 0.5
    inside = ((x > boxes[:, :1]) & (x < boxes[:, 2:3]))[:, None] & (
        (y > boxes[:, 1:2]) & (y < boxes[:, 3:])
    )[:, :, None]
    difference = (found.int() - oracle.int()).abs() * inside
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 1e-3


def test_a_thousand_random_pastes_agree_with_float64(make_boxes):
    torch.manual_seed(0)
    differing = total = 0
    for seed in range(250):
        pick = random.Random(seed)
        height, width, size = pick.randint(1, 30), pick.randint(1, 30), pick.randint(1, 15)
        dtype = (torch.float32, torch.float64)[seed % 2]
        masks = torch.rand(4, size, size)
        boxes = make_boxes(4, height, width, margin=0.3)
        threshold = pick.choice([0.5, 0.4, 0.3, -1.0])
        arguments = (boxes, height, width)
        found = ops.paste_masks(masks.to(dtype), *arguments, threshold=threshold)
        oracle = reference.paste_masks(masks.double(), *arguments, threshold=threshold)
        differing += int((found != oracle).sum())
        total += found.numel()
        assert found.dtype == oracle.dtype
    assert differing <= 1e-5 * total


@pytest.mark.parametrize(("height", "width"), [(70, 333), (40, 1000), (2, 20000), (900, 1)])
def test_images_of_any_width_are_pasted_into(impl, generator, make_boxes, height, width):
    masks, boxes = random_masks(generator, 3, 14), make_boxes(3, height, width, margin=0.1)
    found = impl.paste_masks(masks, boxes, height, width, threshold=-1.0)
    oracle = reference.paste_masks(masks.double(), boxes, height, width, threshold=-1.0)
    assert int((found.int() - oracle.int()).abs().max()) <= 1
    for threshold in (0.0, 0.5):
        found = impl.paste_masks(masks, boxes, height, width, threshold=threshold)
        oracle = reference.paste_masks(masks.double(), boxes, height, width, threshold=threshold)
        assert int((found != oracle).sum()) <= 1e-4 * found.numel()


def test_boxes_without_area_or_number_give_empty_masks(impl):
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor(
        [[3, 3, 3, 9], [9, 3, 3, 9], [nan, 0, 9, 9], [0, 0, inf, 9], [-9e8, -9e8, 9e8, 9e8],
         [1e9, 0, 2e9, 9], [-3e38, 0, 3e38, 9], [50, 50, 60, 60]]
    )  # fmt: skip
    masks = torch.ones(len(boxes), 5, 5)
    for threshold in (0.5, -1.0, 0.0):
        found = impl.paste_masks(masks, boxes, 10, 12, threshold=threshold).flatten(1).any(1)
        assert found[:4].tolist() == [False] * 4 and bool(found[4])
    assert impl.paste_masks(masks[:0], boxes[:0], 10, 12).shape == (0, 10, 12)


def test_byte_masks_are_clamped_and_truncated(impl):
    masks = torch.tensor([[[0.999]], [[-3.0]], [[7.0]], [[0.5]]])
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1)
    found = impl.paste_masks(masks, boxes, 1, 1, threshold=-1.0)
    assert found.flatten().tolist() == [254, 0, 255, 127]


def test_peers_of_the_benchmark_paste_the_same(generator, make_boxes):
    masks, boxes = random_masks(generator, 10, 28), make_boxes(10, 60, 90, margin=-0.1)
    boxes[:, 2:] += 8
    found = paste_masks(masks, boxes, (60, 90))
    oracle = torchvision_paste(masks[:, None], boxes, (60, 90))[:, 0] >= 0.5
    assert float((found != oracle).float().mean()) < 0.01  # it rounds its boxes


# ------------------------------------------------------------------ vote
def published_fcis_loop(masks, boxes, lists, image_size, thresh, crop):
    """Voting as released: OpenCV resizes, whole-image sums; numpy throughout."""
    height, width = image_size
    size = masks.shape[1]
    out = []
    for members, weights in lists:
        total = np.zeros(image_size, np.float64)
        for member, weight in zip(members, weights, strict=True):
            x1, y1, x2, y2 = np.round(boxes[member]).astype(int)
            drawn = cv2.resize(masks[member], (x2 - x1 + 1, y2 - y1 + 1)) >= thresh
            left, top = max(x1, 0), max(y1, 0)
            right, bottom = min(x2, width - 1), min(y2, height - 1)
            if right < left or bottom < top:
                continue
            part = drawn[top - y1 : bottom - y1 + 1, left - x1 : right - x1 + 1]
            total[top : bottom + 1, left : right + 1] += weight * part
        ys, xs = np.nonzero(total >= thresh)
        if len(xs):
            box = [xs.min(), ys.min(), xs.max(), ys.max()]
        elif crop:
            box = [-(-width // 2), -(-height // 2)] * 2
        else:
            box = [width // 2, height // 2] * 2
        x1, y1, x2, y2 = box
        if crop:
            mask = cv2.resize(np.ascontiguousarray(total[y1 : y2 + 1, x1 : x2 + 1]), (size, size))
        else:
            q = np.arange(size) + 0.5
            mask = cv2.remap(
                total.astype(np.float32),
                *np.meshgrid(
                    (x1 + q * (x2 - x1 + 1) / size - 0.5).astype(np.float32),
                    (y1 + q * (y2 - y1 + 1) / size - 0.5).astype(np.float32),
                ),
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
        out.append((box, mask))
    return out


def published_mnc_loop(masks, boxes, lists, image_size, thresh):
    """Voting as released for MNC: pixel loops, corner sampling, the last cell not interpolated."""
    height, width = image_size
    size = masks.shape[1]

    def read(plane, v, u):
        y, x = math.floor(v), math.floor(u)
        if y >= plane.shape[0] - 1 or x >= plane.shape[1] - 1:
            return plane[min(y, plane.shape[0] - 1), min(x, plane.shape[1] - 1)]
        b, a = v - y, u - x
        top = plane[y, x] * (1 - a) + plane[y, x + 1] * a
        return top * (1 - b) + (plane[y + 1, x] * (1 - a) + plane[y + 1, x + 1] * a) * b

    out = []
    for members, weights in lists:
        total = np.zeros(image_size)
        for member, weight in zip(members, weights, strict=True):
            x1, y1, x2, y2 = boxes[member].astype(np.float64)
            for y in range(max(0, math.ceil(y1)), min(height - 1, math.floor(y2)) + 1):
                for x in range(max(0, math.ceil(x1)), min(width - 1, math.floor(x2)) + 1):
                    u = (x - x1) * size / (x2 - x1 + 1)
                    v = (y - y1) * size / (y2 - y1 + 1)
                    total[y, x] += weight * read(masks[member], v, u)
        ys, xs = np.nonzero(total > thresh)
        box = [width // 2, height // 2] * 2
        if len(xs):
            box = [xs.min(), ys.min(), xs.max(), ys.max()]
        x1, y1, x2, y2 = box
        mask = np.zeros((size, size))
        for i in range(size):
            for j in range(size):
                v = y1 + i * (y2 - y1 + 1) / size
                u = x1 + j * (x2 - x1 + 1) / size
                mask[i, j] = read(total, v, u)
        out.append((box, mask))
    return out


def candidate_lists(seed, count, results):
    pick = random.Random(seed)
    lists = []
    for _ in range(results):
        members = sorted(pick.sample(range(count), pick.randint(0, min(count, 4))))
        weights = [pick.random() + 0.1 for _ in members]
        lists.append((members, [w / sum(weights) for w in weights]))
    return lists


def as_tensors(lists):
    index = [member for members, _ in lists for member in members]
    weight = [w for _, weights in lists for w in weights]
    offset = np.cumsum([0] + [len(members) for members, _ in lists])
    return (
        torch.tensor(index, dtype=torch.int32),
        torch.tensor(offset, dtype=torch.int32),
        torch.tensor(weight, dtype=torch.float32),
    )


@pytest.mark.parametrize("mode", ["fcis", "crop", "mnc"])
def test_votes_like_the_published_loops(impl, generator, make_boxes, mode):
    height, width, size = 24, 30, 7
    for seed in range(12):
        masks = random_masks(generator, 6, size)
        boxes = make_boxes(6, height, width, margin=0.15)
        boxes[:, 2:] += 4
        lists = candidate_lists(seed, 6, 3)
        found = impl.mask_vote(masks, boxes, *as_tensors(lists), height, width, mode=mode)
        arguments = (masks.numpy(), boxes.numpy(), lists, (height, width), 0.4)
        if mode == "mnc":
            oracle = published_mnc_loop(*arguments)
        else:
            oracle = published_fcis_loop(*arguments, mode == "crop")
        for mask, box, (oracle_box, oracle_mask) in zip(*found, oracle, strict=True):
            assert box.tolist() == [int(x) for x in oracle_box]
            # OpenCV's remap works in 1/32 pixels
            limit = 0.04 if mode == "fcis" else 1e-4
            np.testing.assert_allclose(mask.numpy(), oracle_mask, atol=limit)


def test_a_thousand_random_votes_agree_with_float64(generator, make_boxes):
    for seed in range(334):
        pick = random.Random(seed)
        mode = ("fcis", "crop", "mnc")[seed % 3]
        dtype = (torch.float32, torch.float64)[seed // 3 % 2]
        height, width, size = pick.randint(1, 30), pick.randint(1, 30), pick.randint(1, 9)
        masks = torch.rand(5, size, size, generator=generator)
        boxes = make_boxes(5, height, width, margin=0.3)
        candidates = as_tensors(candidate_lists(seed, 5, 3))
        found = ops.mask_vote(masks.to(dtype), boxes, *candidates, height, width, mode=mode)
        oracle = reference.mask_vote(masks.double(), boxes, *candidates, height, width, mode=mode)
        assert torch.equal(found[1], oracle[1])
        torch.testing.assert_close(found[0].double(), oracle[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fcis", "crop", "mnc"])
@pytest.mark.parametrize("lowest", [0.1, -0.3])
def test_hundreds_of_voters_and_weights_below_zero(impl, generator, make_boxes, mode, lowest):
    masks, boxes = random_masks(generator, 40, 7), make_boxes(40, 50, 60, margin=0.1)
    boxes[:, 2:] += 20
    lists = []
    for count in (300, 30):
        weights = torch.rand(count, generator=generator) + lowest
        members = torch.randint(40, (count,), generator=generator)
        lists.append((members.tolist(), (weights / weights.sum()).tolist()))
    arguments = (boxes, *as_tensors(lists), 50, 60)
    found = impl.mask_vote(masks, *arguments, mode=mode)
    oracle = reference.mask_vote(masks.double(), *arguments, mode=mode)
    assert torch.equal(found[1], oracle[1])
    torch.testing.assert_close(found[0].double(), oracle[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["fcis", "crop", "mnc"])
def test_unusable_voters_do_not_vote(impl, mode):
    nan = float("nan")
    boxes = torch.tensor(
        [[nan, 0, 5, 5], [0, 0, float("inf"), 5], [1e9, 0, 2e9, 5], [5, 5, 1, 1], [-9, -9, -2, -2]]
    )
    masks = torch.ones(5, 3, 3)
    lists = [([i], [1.0]) for i in range(5)] + [([], [])]
    out_masks, out_boxes = impl.mask_vote(masks, boxes, *as_tensors(lists), 8, 10, mode=mode)
    assert out_boxes.tolist() == [[5, 4, 5, 4]] * 6 and not out_masks.any()


def test_a_threshold_of_zero_takes_the_whole_image(impl):
    arguments = (torch.ones(1, 3, 3), torch.tensor([[1.0, 1.0, 2.0, 2.0]]))
    candidates = as_tensors([([0], [1.0])])
    _, boxes = impl.mask_vote(*arguments, *candidates, 6, 9, binary_thresh=0.0, mode="fcis")
    assert boxes.tolist() == [[0, 0, 8, 5]]
    _, boxes = impl.mask_vote(*arguments, *candidates, 6, 9, binary_thresh=0.0, mode="mnc")
    assert boxes.tolist() == [[1, 1, 2, 2]]


def test_votes_of_nobody(impl):
    empty = torch.zeros(0, dtype=torch.int32)
    offset = torch.zeros(1, dtype=torch.int32)
    masks, boxes = impl.mask_vote(
        torch.zeros(0, 3, 3), torch.zeros(0, 4), empty, offset, torch.zeros(0), 8, 10
    )
    assert masks.shape == (0, 3, 3) and boxes.shape == (0, 4) and boxes.dtype == torch.int32


@pytest.mark.parametrize(
    ("index", "offset", "message"),
    [
        ([0, 3], [0, 2], "cand_index must lie in"),
        ([0, -1], [0, 2], "cand_index must lie in"),
        ([0, 1], [0, 1], "cand_offset must rise"),
        ([0, 1], [1, 2], "cand_offset must rise"),
        ([0, 1], [0, 2, 1, 2], "cand_offset must rise"),
    ],
)
def test_broken_candidate_lists_are_refused(impl, index, offset, message):
    with pytest.raises(RuntimeError, match=message):
        impl.mask_vote(
            torch.zeros(2, 3, 3), torch.zeros(2, 4), torch.tensor(index, dtype=torch.int32),
            torch.tensor(offset, dtype=torch.int32), torch.ones(2), 8, 10,
        )  # fmt: skip


def test_wrong_arguments_are_named():
    masks, boxes = torch.zeros(2, 3, 3), torch.zeros(2, 4)
    candidates = as_tensors([([0], [1.0])])
    with pytest.raises(RuntimeError, match="mode must be one of fcis, mnc, crop"):
        mask_vote(masks, boxes, *candidates, (8, 8), mode="loud")
    with pytest.raises(RuntimeError, match="half precision cannot hold"):
        paste_masks(masks, boxes.half(), (8, 8))
    with pytest.raises(RuntimeError, match="as many boxes as masks"):
        paste_masks(masks, boxes[:1], (8, 8))
    with pytest.raises(RuntimeError, match=r"masks must be \(N, M, M\)"):
        paste_masks(torch.zeros(2, 3, 4), boxes, (8, 8))
    with pytest.raises(RuntimeError, match=r"masks must be \(N, 1, M, M\)"):
        mask_gate(torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 5, 5))
    with pytest.raises(RuntimeError, match="sizes must be at least 1"):
        mask_resize(torch.zeros(2, 1, 4, 4), 0)


def test_voting_refuses_gradients_and_pasting_has_none():
    masks, boxes = torch.rand(2, 3, 3, requires_grad=True), torch.tensor([[0.0, 0, 4, 4]] * 2)
    candidates = as_tensors([([0], [1.0])])
    with pytest.raises(NotImplementedError, match="not differentiable"):
        mask_vote(masks, boxes, *candidates, (8, 8))
    with torch.no_grad():
        mask_vote(masks, boxes, *candidates, (8, 8))
    assert not paste_masks(masks, boxes, (8, 8)).requires_grad
