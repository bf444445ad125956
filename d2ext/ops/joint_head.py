"""FCIS' class scores and masks from one set of score maps, without the assembled tensor.

Source: Li et al., "Fully Convolutional Instance-aware Semantic Segmentation" (FCIS), section 2.2.
"""

import torch
from torch import Tensor

from d2ext.ops._checks import layout_of
from d2ext.ops._library import define_op
from d2ext.ops.reference import joint_head as _reference


def _fake(score, rois, spatial_scale, group_size, out_size, pick=None, *, inclusive=False):
    _reference.check_head("fcis_joint_head", score, rois, spatial_scale, group_size, out_size, pick)
    count = rois.shape[0]
    classes = score.shape[1] // (2 * group_size * group_size)
    seg_logit = torch.empty(
        (count, 2, out_size, out_size),
        dtype=score.dtype,
        device=score.device,
        memory_format=layout_of(score),
    )
    picked = torch.empty((count,), dtype=torch.int64, device=score.device)
    return score.new_empty((count, classes)), seg_logit, picked


def _backward_fake(
    grad_cls, grad_seg, score, rois, picked, spatial_scale, group_size, out_size, inclusive
):
    return torch.empty(
        score.shape, dtype=score.dtype, device=score.device, memory_format=layout_of(score)
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    score, rois = inputs[:2]
    picked = output[2]
    ctx.mark_non_differentiable(picked)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(score, rois, picked)
    ctx.arguments = (*inputs[2:5], *keyword_only_inputs.values())


def _backward(ctx, grad_cls, grad_seg, _):
    nothing = (None,) * 5
    if grad_cls is None and grad_seg is None:
        return (None, *nothing)
    return (_head_backward(grad_cls, grad_seg, *ctx.saved_tensors, *ctx.arguments), *nothing)


_head_backward = define_op(
    "fcis_joint_head_backward",
    "(Tensor? grad_cls, Tensor? grad_seg, Tensor score, Tensor rois, Tensor picked,"
    " float spatial_scale, int group_size, int out_size, bool inclusive) -> Tensor",
    reference=_reference.fcis_joint_head_backward,
    fake=_backward_fake,
)
_head = define_op(
    "fcis_joint_head",
    "(Tensor score, Tensor rois, float spatial_scale, int group_size, int out_size,"
    " Tensor? pick=None, *, bool inclusive=False)"
    " -> (Tensor cls_score, Tensor seg_logit, Tensor picked)",
    reference=_reference.fcis_joint_head,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def fcis_joint_head(
    score: Tensor,
    rois: Tensor,
    spatial_scale: float,
    group_size: int,
    out_size: int,
    pick: Tensor | None = None,
    *,
    inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class scores and mask logits of FCIS in one pass over the score maps.

    With A = `ps_roi_assemble(score, ...)`, where map 2c is "outside" and map 2c + 1 "inside" of
    class c and the last class is the background: the score of class c is the mean over cells of
    `max(A[2c], A[2c+1])` (a tie sends its gradient to "outside"), and the mask logits are the
    pair of one picked class. A itself, (N, 2K, P, P), is never held.

    Args:
        score: (B, 2*K*k*k, H, W), floating; K counts the background.
        rois, spatial_scale, group_size, out_size, inclusive: as in `ps_roi_assemble`.
        pick: (N,) int64, the class whose mask is wanted, e.g. training labels. Outside `0..K-1`:
            zeros without gradient. None picks the best class but the background.

    Returns:
        `cls_score` (N, K), raw; `seg_logit` (N, 2, P, P), outside then inside;
        `picked` (N,) int64, the class used (-1 when there is none besides the background).
    """
    return _head(score, rois, spatial_scale, group_size, out_size, pick, inclusive=inclusive)
