"""Operators on instance masks: MNC's resize and gate, pasting, and mask voting.

Sources: Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network Cascades" (MNC),
sections 3.3 and 6; Li et al., "Fully Convolutional Instance-aware Semantic Segmentation" (FCIS),
section 2.3; detectron2's `paste_masks_in_image`.
"""

import torch
from torch import Tensor

from d2ext.ops._checks import layout_of
from d2ext.ops._library import define_op
from d2ext.ops.reference import mask_ops as _reference
from d2ext.ops.roi_warp import pair


# ------------------------------------------------------------------ resize
def _resize_fake(masks, out_h, out_w):
    _reference.check_resize("mask_resize", masks, out_h, out_w)
    return masks.new_empty((masks.shape[0], masks.shape[1], out_h, out_w))


def _resize_setup(ctx, inputs, output):
    ctx.size = inputs[0].shape[2:]


def _resize_grad(ctx, grad):
    return _mask_resize_backward(grad, *ctx.size), None, None


_mask_resize_backward = define_op(
    "mask_resize_backward",
    "(Tensor grad, SymInt mask_h, SymInt mask_w) -> Tensor",
    reference=_reference.mask_resize_backward,
    fake=_resize_fake,
)
_mask_resize = define_op(
    "mask_resize",
    "(Tensor masks, SymInt out_h, SymInt out_w) -> Tensor",
    reference=_reference.mask_resize,
    fake=_resize_fake,
    setup_context=_resize_setup,
    backward=_resize_grad,
)


# ------------------------------------------------------------------ gate
def _like(tensor):
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout_of(tensor)
    )


def _gate_fake(features, masks):
    _reference.check_gate("mask_gate", features, masks)
    return _like(features)


def _gate_backward_fake(grad, features, masks):
    return _like(features), masks.new_empty(masks.shape)


def _gate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gate_grad(ctx, grad):
    return _mask_gate_backward(grad, *ctx.saved_tensors)


_mask_gate_backward = define_op(
    "mask_gate_backward",
    "(Tensor grad, Tensor features, Tensor masks) -> (Tensor, Tensor)",
    reference=_reference.mask_gate_backward,
    fake=_gate_backward_fake,
)
_mask_gate = define_op(
    "mask_gate",
    "(Tensor features, Tensor masks) -> Tensor",
    reference=_reference.mask_gate,
    fake=_gate_fake,
    setup_context=_gate_setup,
    backward=_gate_grad,
)


# ------------------------------------------------------------------ paste and vote
def _paste_fake(masks, boxes, img_h, img_w, *, threshold=0.5):
    _reference.check_paste("paste_masks", masks, boxes, img_h, img_w)
    dtype = torch.uint8 if threshold < 0 else torch.bool
    return masks.new_empty((masks.shape[0], img_h, img_w), dtype=dtype)


def _paste_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.mark_non_differentiable(output)


def _vote_fake(
    masks, boxes, cand_index, cand_offset, cand_weight, img_h, img_w, *,
    binary_thresh=0.4, mode="fcis",
):  # fmt: skip
    _reference.check_vote(
        "mask_vote", masks, boxes, cand_index, cand_offset, cand_weight, img_h, img_w, mode
    )
    results = cand_offset.shape[0] - 1
    voted = masks.new_empty((results, masks.shape[1], masks.shape[2]))
    return voted, cand_index.new_empty((results, 4))


def _vote_setup(ctx, inputs, keyword_only_inputs, output):
    if any(ctx.needs_input_grad):
        raise NotImplementedError("mask_vote is not differentiable: call it under torch.no_grad()")


_paste_masks = define_op(
    "paste_masks",
    "(Tensor masks, Tensor boxes, SymInt img_h, SymInt img_w, *, float threshold=0.5) -> Tensor",
    reference=_reference.paste_masks,
    fake=_paste_fake,
    setup_context=_paste_setup,
)
_mask_vote = define_op(
    "mask_vote",
    "(Tensor masks, Tensor boxes, Tensor cand_index, Tensor cand_offset, Tensor cand_weight,"
    " SymInt img_h, SymInt img_w, *, float binary_thresh=0.4, str mode='fcis')"
    " -> (Tensor masks, Tensor boxes)",
    reference=_reference.mask_vote,
    fake=_vote_fake,
    setup_context=_vote_setup,
)


def mask_resize(masks: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """Bilinear resize with corner-anchored samples at `i * M / out` (MNC's mask resize).

    This is neither setting of `align_corners`. Samples more than half a cell past the last cell
    give 0 (only when enlarging more than twice).

    Args:
        masks: (N, C, M, M), floating.
        output_size: output height and width.

    Returns:
        (N, C, output height, output width), contiguous, differentiable.
    """
    return _mask_resize(masks, *pair(output_size))


def mask_gate(features: Tensor, masks: Tensor) -> Tensor:
    """Multiply RoI features by their masks, resized to the features' grid (MNC's mask pooling).

    Args:
        features: (N, C, h, w), floating.
        masks: (N, 1, M, M) of the same dtype, probabilities; resized as in `mask_resize`.

    Returns:
        `features * mask_resize(masks, (h, w))`, differentiable in both.
    """
    return _mask_gate(features, masks)


def paste_masks(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], *, threshold: float = 0.5
) -> Tensor:
    """Draw box masks into images, by detectron2's rule.

    The centre of pixel x samples the mask at `(x + 0.5 - x1) / (x2 - x1) * M - 0.5`, bilinear,
    with zeros around the mask.

    Args:
        masks: (N, M, M) values in 0..1, floating.
        boxes: (N, 4) x1, y1, x2, y2 in pixels of the image, continuous (x2 exclusive), float32. A
            box without area, or with a NaN or an infinity, gives an empty mask.
        image_size: height, width.
        threshold: at least 0: bool masks `value >= threshold`; below 0: uint8 of `255 * value`,
            truncated.

    Returns:
        (N, height, width), bool or uint8, without gradient.
    """
    return _paste_masks(masks, boxes, *image_size, threshold=threshold)


def mask_vote(
    masks: Tensor,
    boxes: Tensor,
    cand_index: Tensor,
    cand_offset: Tensor,
    cand_weight: Tensor,
    image_size: tuple[int, int],
    *,
    binary_thresh: float = 0.4,
    mode: str = "fcis",
) -> tuple[Tensor, Tensor]:
    """Weighted averages of box masks in image space, and the tight boxes around them.

    Result r averages the candidates `cand_offset[r]:cand_offset[r+1]` of `cand_index` in that
    order. `vote_candidates` builds the three lists.

    Args:
        masks: (N, M, M) values in 0..1, floating.
        boxes: (N, 4) x1, y1, x2, y2, inclusive pixel indices of the image, float32.
        cand_index: (E,) int32 rows of `masks`.
        cand_offset: (R + 1,) int32, rising from 0 to E.
        cand_weight: (E,) float32, each result's weights already normalised.
        image_size: height, width.
        binary_thresh: threshold of masks and of the average.
        mode: "fcis": boxes rounded, half-pixel sampling, each mask made binary, average `>=`
            threshold, resampled from the whole average (FCIS' GPU release). "crop": the same,
            resampled from the tight box alone (CPU variants of both releases). "mnc": boxes as they
            are, corner sampling, masks kept continuous, average `>` threshold (MNC's GPU
            release).

    Returns:
        masks (R, M, M), the averages resampled inside their tight boxes, and boxes (R, 4) int32,
        inclusive. An average that nowhere reaches the threshold gets the one-pixel box at the image
        centre.

    Raises:
        NotImplementedError: when `masks` or `boxes` require a gradient and gradients are on.
    """
    return _mask_vote(
        masks, boxes, cand_index, cand_offset, cand_weight, *image_size,
        binary_thresh=binary_thresh, mode=mode,
    )  # fmt: skip
