"""FCIS as a program: two readings of the score maps, and the vote, with tensors alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.export import Corners, Detections, ExportForm, Inputs, register_drawing, register_form
from d2ext.export.proposals import check_rpn
from d2ext.modeling.regions.boxes import to_continuous, to_inclusive
from d2ext.ops.decompositions import choose_seeds_form, mask_voting_form
from d2ext.projects.fcis.postprocessing import place_masks
from d2ext.projects.fcis.roi_heads import FCISROIHeads, ScoreMaps

from detectron2.structures import Instances


class _Pool(NamedTuple):
    """Scored regions, see `FCISROIHeads.candidates`; `boxes` are continuous."""

    boxes: Tensor
    pixels: Tensor
    scores: Tensor
    masks: Tensor


@register_drawing("fcis")
def _draw(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    return place_masks(Instances(size), masks, to_inclusive(boxes), threshold).pred_masks


@register_form(FCISROIHeads)
class FCISForm(ExportForm):
    """FCIS with and without voting."""

    drawing = "fcis"

    def __init__(self, model: torch.nn.Module, all_stages: bool = False):
        self.stages = 2 if model.roi_heads.refine else 1
        super().__init__(model, all_stages)

    def check(self) -> None:
        check_rpn(self.model.proposal_generator)

    @property
    def mask_threshold(self) -> float:
        return self.model.roi_heads.voting.binary_threshold

    def detect(self, features, boxes, inputs):
        heads = self.model.roi_heads
        maps = heads.score_maps(features)
        pool, deltas = self._read(maps, boxes)
        pools = [pool]
        if heads.refine:
            moved = heads.box2box_transform.apply_deltas(deltas, boxes)
            moved, _ = self._read(maps, inputs.clip(moved, whole_pixel=True))
            pools.append(_Pool(*(torch.cat(pair) for pair in zip(pool, moved))))
        used = pools if self.all_stages else pools[-1:]
        return [self._finish(pool, inputs) for pool in used]

    def _read(self, maps: ScoreMaps, boxes: Tensor) -> tuple[_Pool, Tensor]:
        heads = self.model.roi_heads
        read = heads.score_regions(maps, [Corners(boxes)])
        scores = read.logits.softmax(dim=1)[:, : heads.num_classes]
        return _Pool(boxes, read.pixel_boxes, scores, read.seg.softmax(dim=1)[:, 1]), read.deltas

    def _finish(self, pool: _Pool, inputs: Inputs) -> Detections:
        heads = self.model.roi_heads
        sides = pool.boxes[:, 2:] - pool.boxes[:, :2]
        kept = (sides >= heads.min_size_test).all(dim=1).nonzero()[:, 0]
        pool = _Pool(*(x[kept] for x in pool))
        if heads.vote:
            found = mask_voting_form(
                heads.voting,
                _scaled(pool.pixels, inputs),
                pool.masks,
                pool.scores,
                inputs.output_sides(),
            )
            boxes, scores, classes, masks = found.boxes, found.scores, found.classes, found.masks
        else:
            seeds, classes = choose_seeds_form(heads.voting, pool.pixels, pool.scores)
            boxes, masks = _scaled(pool.pixels[seeds], inputs), pool.masks[seeds]
            scores = pool.scores[seeds, classes]
        return Detections(to_continuous(boxes.round()), scores, classes, masks)


def _scaled(boxes: Tensor, inputs: Inputs) -> Tensor:
    """`d2ext.projects.fcis.postprocessing.scale_boxes`."""
    extent = inputs.output_extent
    return torch.minimum((boxes * (extent / inputs.extent)).clamp(min=0), extent - 1)
