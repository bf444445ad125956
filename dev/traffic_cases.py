"""What dev/kernel_traffic.py counts: every operator with a CUDA kernel at the layout of real
networks, with fewer channels, classes or regions, so that the emulation takes seconds."""

from collections.abc import Callable

import op_peers
import torch

SCALE = op_peers.SCALE
HEIGHT, WIDTH = 38, 63  # an image of 600 x 1000 at stride 16
GROUP, SIZE = 7, 21  # of FCIS


def _rois(count: int) -> torch.Tensor:
    return op_peers.random_rois(count, 1, HEIGHT * 16, WIDTH * 16)


def _warp(size: int, pool: bool, last: bool, backward: bool, count: int = 24) -> tuple:
    ops, channels = torch.ops.d2ext, 64
    feature, rois = torch.randn(1, channels, HEIGHT, WIDTH), _rois(count)
    if last:
        feature = feature.to(memory_format=torch.channels_last)
    rule = (False, False, "clamp_half", *(() if pool else ("point",)))
    if not backward:
        forward = ops.roi_warp_max_pool if pool else ops.roi_warp
        names = ("aligned", "quantize", "border", "bin_reduce")
        options = dict(zip(names, rule, strict=False))
        return lambda f, r: forward(f, r, SCALE, size, size, **options), (feature, rois)
    grad = torch.randn(count, channels, size, size)
    if last:
        grad = grad.to(memory_format=torch.channels_last)
    op = ops.roi_warp_max_pool_backward if pool else ops.roi_warp_backward
    return lambda g, f, r: op(g, f, r, SCALE, size, size, *rule, True, True), (grad, feature, rois)


def _pyramid(backward: bool, last: bool) -> tuple:
    ops, channels, count, size = torch.ops.d2ext, 64, 24, 7
    layout = torch.channels_last if last else torch.contiguous_format
    strides, extent = (4, 8, 16, 32), (304, 504)
    scales = [1 / stride for stride in strides]
    features = [
        torch.randn(1, channels, *(-(-n // stride) for n in extent)).to(memory_format=layout)
        for stride in strides
    ]
    rois = op_peers.random_rois(count, 1, *extent)
    if not backward:
        forward = ops.pyramid_roi_align
        return lambda f, r: forward(f, r, scales, size, size), (features, rois)
    grad = torch.randn(count, channels, size, size).to(memory_format=layout)
    sizes = [1, channels, *(n for feature in features for n in feature.shape[2:])]
    op = ops.pyramid_roi_align_backward
    return lambda g, r: op(g, r, sizes, scales, last, 0, 1, 224.0, 4), (grad, rois)


def _assemble(mean: bool, backward: bool, dtype: torch.dtype) -> tuple:
    ops, maps, count = torch.ops.d2ext, 4, 300
    feature, rois = torch.randn(1, maps * GROUP**2, HEIGHT, WIDTH).to(dtype), _rois(count)
    size = [] if backward and not mean else [SIZE]
    name = f"ps_roi_{'mean' if mean else 'assemble'}{'_backward' * backward}"
    op = getattr(ops, name)
    if not backward:
        return lambda f, r: op(f, r, SCALE, GROUP, SIZE, inclusive=True), (feature, rois)
    grad = torch.randn(count, maps, *([] if mean else [SIZE, SIZE])).to(dtype)
    shape = feature.shape
    return lambda g, r: op(g, r, SCALE, GROUP, *size, shape, True), (grad, rois)


def _head(classes: int, backward: bool, dtype: torch.dtype) -> tuple:
    ops, count = torch.ops.d2ext, 300
    score, rois = torch.randn(1, 2 * classes * GROUP**2, HEIGHT, WIDTH).to(dtype), _rois(count)
    if not backward:
        op = ops.fcis_joint_head
        return lambda s, r: op(s, r, SCALE, GROUP, SIZE, None, inclusive=True), (score, rois)
    cls = torch.randn(count, classes).to(dtype)
    seg = torch.randn(count, 2, SIZE, SIZE).to(dtype)
    pick = torch.randint(classes, (count,))
    op = ops.fcis_joint_head_backward
    return (
        lambda *tensors: op(*tensors, SCALE, GROUP, SIZE, True),
        (cls, seg, score, rois, pick),
    )


def _masks(kind: str) -> tuple:
    ops, count = torch.ops.d2ext, 24
    masks, boxes = op_peers.smooth_masks(count, 28), _rois(count)[:, 1:]
    if kind == "paste":
        return lambda m, b: ops.paste_masks(m, b, 304, 504), (masks, boxes * 0.5)
    if kind == "resize":
        return lambda m: ops.mask_resize(m, 14, 14), (op_peers.smooth_masks(300, 21)[:, None],)
    feature, mask = torch.randn(count, 64, 14, 14), op_peers.smooth_masks(count, 21)[:, None]
    if kind == "gate":
        return ops.mask_gate, (feature, mask)
    return ops.mask_gate_backward, (torch.randn_like(feature), feature, mask)


def _vote() -> tuple:
    ops, count, voters = torch.ops.d2ext, 12, 8
    boxes = _rois(count)[:, 1:].repeat_interleave(voters, 0) + torch.randn(count * voters, 4)
    masks = op_peers.smooth_masks(len(boxes), 21)
    index = torch.arange(len(boxes), dtype=torch.int32)
    offset = torch.arange(0, len(boxes) + 1, voters, dtype=torch.int32)
    weight = torch.full((len(boxes),), 1 / voters)
    tensors = (masks, boxes, index, offset, weight)
    return lambda *inputs: ops.mask_vote(*inputs, 608, 1008), tensors


def cases() -> dict[str, Callable[[], tuple]]:
    """Name of a case: maker of its function and inputs."""
    found = {}
    for last in (False, True):
        layout = "NHWC" if last else "NCHW"
        text = f"C64 N24 38x63 {layout}"
        for name, pool in (("roi_warp", False), ("roi_warp_max_pool", True)):
            for back in (False, True):
                found[f"{name} {'backward' if back else 'forward'}, {text}"] = (
                    lambda p=pool, n=last, b=back: _warp(14, p, n, b)
                )
        for backward in (False, True):
            name = f"pyramid_roi_align {'backward' if backward else 'forward'}"
            found[f"{name}, C64 N24 304x504 {layout}"] = lambda b=backward, n=last: _pyramid(b, n)
    # Beside so many regions, what is done once a map counts little.
    for name, pool in (("roi_warp", False), ("roi_warp_max_pool", True)):
        for back in (False, True):
            found[f"{name} {'backward' if back else 'forward'}, C64 N300 38x63 NCHW"] = (
                lambda p=pool, b=back: _warp(14, p, False, b, 300)
            )
    for dtype in (torch.float32, torch.float16):
        kind = str(dtype)[6:]
        for mean in (False, True):
            for back in (False, True):
                name = f"{'mean' if mean else 'assemble'} {'backward' if back else 'forward'}"
                found[f"{name}, D4 21x21 N300 38x63 {kind}"] = lambda m=mean, b=back, d=dtype: (
                    _assemble(m, b, d)
                )
        for back in (False, True):
            name = f"head {'backward' if back else 'forward'}"
            classes = 8 if back else 21
            found[f"{name}, K{classes} 21x21 N300 38x63 {kind}"] = (
                lambda k=classes, b=back, d=dtype: _head(k, b, d)
            )
    found["paste_masks, 24 x 304x504"] = lambda: _masks("paste")
    found["mask_resize, N300 21x21 to 14x14"] = lambda: _masks("resize")
    found["mask_gate forward, C64 N24 14x14"] = lambda: _masks("gate")
    found["mask_gate backward, C64 N24 14x14"] = lambda: _masks("gate backward")
    found["mask_vote, 12 of 8 voters 608x1008"] = _vote
    return found
