"""Region proposals of one image, of both lineages of RPN, for `d2ext.export.forms`."""

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from d2ext.export.structures import Inputs, refuse
from d2ext.modeling.rpn.caffe import CaffeRPN
from d2ext.ops.decompositions import best_rows

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator.rpn import RPN


def check_rpn(rpn: nn.Module) -> None:
    """Refuse networks without a form."""
    if not isinstance(rpn, RPN):
        refuse(f"proposals of {type(rpn).__name__}")
    if not isinstance(rpn.anchor_generator, DefaultAnchorGenerator):
        refuse(f"anchors of {type(rpn.anchor_generator).__name__}")


def propose(rpn: RPN, features: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Boxes (R, 4), best first."""
    maps = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(maps)
    scores = [x[0].permute(1, 2, 0).flatten() for x in logits]
    deltas = [x[0].reshape(-1, 4, *x.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4) for x in deltas]
    anchors = [_anchors(rpn.anchor_generator, level, x) for level, x in enumerate(maps)]
    if isinstance(rpn, CaffeRPN):
        return _propose_caffe(rpn, anchors[0], scores[0], deltas[0], maps[0], inputs)
    return _propose_by_level(rpn, anchors, scores, deltas, inputs)


def _anchors(generator: DefaultAnchorGenerator, level: int, x: Tensor) -> Tensor:
    """Boxes (h w A, 4), by row, column and anchor of the cell."""
    cell, stride = list(generator.cell_anchors)[level], generator.strides[level]
    y, x = ((torch.arange(n, dtype=cell.dtype) + generator.offset) * stride for n in x.shape[2:])
    rows, columns = y.shape[0], x.shape[0]
    y, x = y[:, None].expand(rows, columns), x[None].expand(rows, columns)
    centers = torch.stack([x, y, x, y], dim=-1)[:, :, None]
    return (centers + cell).reshape(-1, 4)


def _finite(boxes: Tensor, scores: Tensor) -> Tensor:
    return torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)


def _propose_by_level(
    rpn: RPN, anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor], inputs: Inputs
) -> Tensor:
    """detectron2's `find_top_rpn_proposals`; one suppression for each level."""
    before, after = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
    boxes, scores = [], []
    for sources, values, moves in zip(anchors, logits, deltas):
        rows = best_rows(values, before)
        decoded = rpn.box2box_transform.apply_deltas(moves[rows], sources[rows])
        finite, decoded = _finite(decoded, values[rows]), inputs.clip(decoded)
        sides = decoded[:, 2:] - decoded[:, :2]
        kept = (finite & (sides > rpn.min_box_size).all(dim=1)).nonzero()[:, 0]
        decoded, values = decoded[kept], values[rows][kept]
        best = nms(decoded, values, rpn.nms_thresh)
        boxes.append(decoded[best])
        scores.append(values[best])
    return torch.cat(boxes)[best_rows(torch.cat(scores), after)]


def _propose_caffe(
    rpn: CaffeRPN, anchors: Tensor, logits: Tensor, deltas: Tensor, x: Tensor, inputs: Inputs
) -> Tensor:
    """`CaffeRPN.propose_in_image`; of `DifferentiableRPN`, too."""
    covered = rpn.covered_cells(inputs.size).clamp(min=1)
    rows, columns = (torch.arange(n, device=anchors.device) for n in x.shape[2:])
    usable = (rows < covered[0])[:, None] & (columns < covered[1])
    usable = usable[..., None].expand(-1, -1, rpn.anchor_generator.num_anchors[0]).flatten()
    boxes = rpn.box2box_transform.apply_deltas(deltas, anchors)
    boxes = inputs.clip(boxes, whole_pixel=True)
    least: float | Tensor = rpn.min_box_size
    if getattr(rpn, "scale_min_size", False):
        # Pixels of the network input per pixel of the image.
        scales = inputs.extent / inputs.output_extent
        least = least * scales.amin()
    large = ((boxes[:, 2:] - boxes[:, :2]) >= least).all(dim=1) & _finite(boxes, logits) & usable
    scores = torch.where(large, logits, torch.full_like(logits, -torch.inf))
    rows = best_rows(scores, rpn.pre_nms_topk[False])
    boxes, logits = boxes[rows], logits[rows]
    kept = nms(boxes, logits, rpn.nms_thresh)
    return boxes[kept][best_rows(logits[kept], rpn.post_nms_topk[False])]
