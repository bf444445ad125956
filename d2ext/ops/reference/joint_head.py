"""FCIS' joint head in plain PyTorch, assembled and reduced chunk by chunk.

Source: Li et al., "Fully Convolutional Instance-aware Semantic Segmentation", section 2.2: one pair
of score maps per class gives the class score (pixel-wise maximum, then mean) and the mask
(pixel-wise softmax over the pair).
"""

import torch
from torch import Tensor

from d2ext.ops._checks import accumulate_type, layout_of, require
from d2ext.ops.reference.ps_roi import (
    Assembly,
    as_contiguous,
    check,
    chunks,
    integral,
    integral_transpose,
)


def check_head(op, score, rois, scale, group_size, out_size, pick) -> None:
    check(op, score, rois, scale, group_size, out_size, "score", sides=2)
    if pick is not None:
        require(
            pick.dtype == torch.int64
            and pick.dim() == 1
            and pick.shape[0] == rois.shape[0]
            and pick.device == score.device,
            f"{op}: pick must be int64 of shape (N,) on the device of score",
        )


def _pairs(assembly: Assembly, table: Tensor) -> Tensor:
    """(n, P, P, K, 2) assembled maps, outside first."""
    means = assembly.mean(table)
    return means.view(*means.shape[:3], -1, 2)


def _picked_pairs(pick: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(rows that picked a class, the classes they picked)."""
    rows = torch.nonzero((pick >= 0) & (pick < classes)).flatten()
    return rows, pick[rows]


def fcis_joint_head(
    score, rois, spatial_scale, group_size, out_size, pick=None, *, inclusive=False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `d2ext.ops.fcis_joint_head`."""
    check_head("fcis_joint_head", score, rois, spatial_scale, group_size, out_size, pick)
    parts = group_size * group_size
    classes = score.shape[1] // (2 * parts)
    count = len(rois)
    accumulate = accumulate_type(score)
    cls_score = score.new_zeros((count, classes), dtype=accumulate)
    seg_logit = score.new_zeros((count, 2, out_size, out_size))
    arguments = (spatial_scale, group_size, out_size, inclusive)
    if pick is None:
        picked = rois.new_full((count,), -1 if classes < 2 else 0, dtype=torch.int64)
    else:
        picked = pick.clone()
    if score.numel() and count:
        table = integral(as_contiguous(score), parts)
        for part in chunks(rois, 2 * classes, out_size):
            pairs = _pairs(Assembly(score.shape, rois[part], *arguments), table)
            outside, inside = pairs.unbind(-1)
            best = torch.where(inside > outside, inside, outside)
            cls_score[part] = best.mean((1, 2)).to(accumulate)
            if pick is None and classes > 1:
                picked[part] = cls_score[part, :-1].argmax(1)
            rows, chosen = _picked_pairs(picked[part], classes)
            mask = pairs[rows, :, :, chosen].permute(0, 3, 1, 2)
            seg_logit[part][rows] = mask.to(score.dtype)
    seg_logit = seg_logit.contiguous(memory_format=layout_of(score))
    return cls_score.to(score.dtype), seg_logit, picked


def fcis_joint_head_backward(
    grad_cls, grad_seg, score, rois, picked, spatial_scale, group_size, out_size, inclusive
) -> Tensor:
    """Gradient by `score`; either of `grad_cls` and `grad_seg` may be None."""
    op = "fcis_joint_head"
    check_head(op, score, rois, spatial_scale, group_size, out_size, picked)
    parts = group_size * group_size
    classes = score.shape[1] // (2 * parts)
    require(
        grad_cls is None or tuple(grad_cls.shape) == (len(rois), classes),
        f"{op}: grad_cls must have the shape of cls_score",
    )
    require(
        grad_seg is None or tuple(grad_seg.shape) == (len(rois), 2, out_size, out_size),
        f"{op}: grad_seg must have the shape of seg_logit",
    )
    arguments = (spatial_scale, group_size, out_size, inclusive)
    batch, _, height, width = score.shape
    table_grad = score.new_zeros(
        (batch * parts * (height + 1) * (width + 1), 2 * classes), dtype=torch.float64
    )
    if score.numel() and len(rois):
        table = integral(as_contiguous(score), parts)
        for part in chunks(rois, 2 * classes, out_size):
            assembly = Assembly(score.shape, rois[part], *arguments)
            pairs = _pairs(assembly, table)
            grad = torch.zeros_like(pairs)
            if grad_cls is not None:
                share = grad_cls[part].double()[:, None, None, :] / (out_size * out_size)
                inside = pairs[..., 1] > pairs[..., 0]
                grad[..., 0] = torch.where(inside, 0.0, share)
                grad[..., 1] = torch.where(inside, share, 0.0)
            if grad_seg is not None:
                rows, chosen = _picked_pairs(picked[part], classes)
                grad[rows, :, :, chosen] += grad_seg[part][rows].double().permute(0, 2, 3, 1)
            assembly.spread(table_grad, grad.flatten(3))
    result = integral_transpose(table_grad, score.shape, parts).to(score.dtype)
    return result.contiguous(memory_format=layout_of(score))
