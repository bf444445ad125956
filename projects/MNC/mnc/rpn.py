"""The first stage: a region proposal network whose boxes stay part of the graph, and which learns
from the boxes that the later stages were trained on (MNC paper, sections 3.1 and 3.4)."""

from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from d2ext.modeling import CaffeRPN
from d2ext.structures import clip_boxes

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances

from .box_transform import MNCBoxTransform, exact_boxes
from .stage_bridge import limit_gradient

__all__ = ["DifferentiableRPN", "relabel_anchors"]

Sample = Callable[[List[Instances], List[Instances]], List[Instances]]


def _inside(boxes: Tensor, image_size: Tuple[int, int]) -> Tensor:
    """(N,) bool, whether boxes (N x 4) lie within the image."""
    height, width = image_size
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)


def relabel_anchors(labels: Tensor, samples: Instances, inside: Tensor) -> Tensor:
    """Anchor labels that agree with the sampled boxes.

    Args:
        labels (Tensor): (A,) in {-1, 0, 1}.
        samples: with ``anchor_index`` (-1 for none) and ``foreground`` (bool).
        inside (Tensor): (A,) bool; other anchors keep their label.

    Returns:
        Tensor: (A,) labels; anchors of background boxes are 0, those of foreground boxes 1.
    """
    labels = labels.clone()
    for chosen, value in ((~samples.foreground, 0), (samples.foreground, 1)):
        anchors = samples.anchor_index[chosen]
        anchors = anchors[anchors >= 0]
        labels[anchors[inside[anchors]]] = value
    return labels


@PROPOSAL_GENERATOR_REGISTRY.register()
class DifferentiableRPN(CaffeRPN):
    """The Caffe lineage's RPN with proposals that are functions of its box branch.

    Ranking and suppression only select; there is no gradient to the objectness from the boxes. A
    proposal passes its gradient on if neither its anchor nor the box before clipping leaves the
    image. Proposals come from all cells of the image, also those cut by its border.
    """

    @configurable
    def __init__(
        self,
        *,
        box_gradient_limit: Optional[float] = 1 / 512,
        relabel_from_rois: bool = True,
        normalize_box_by_sampled: bool = True,
        detach_boxes: bool = False,
        **kwargs,
    ):
        """
        Args:
            box_gradient_limit (float): the gradient that reaches the deltas through the proposals
                is clipped to this, elementwise, for each image before the images are averaged;
                None or 0 for no limit. The gradient of the RPN's own losses is not clipped.
            relabel_from_rois (bool): anchors whose proposals are sampled for the later stages take
                part in the RPN's losses with the labels of these samples.
            normalize_box_by_sampled, detach_boxes, kwargs: see :class:`CaffeRPN`.
        """
        super().__init__(
            normalize_box_by_sampled=normalize_box_by_sampled, detach_boxes=detach_boxes, **kwargs
        )
        self.box_gradient_limit = box_gradient_limit
        self.relabel_from_rois = relabel_from_rois

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        own = cfg.MODEL.MNC
        ret = super().from_config(cfg, input_shape)
        ret["box2box_transform"] = MNCBoxTransform(
            cfg.MODEL.RPN.BBOX_REG_WEIGHTS, plus_one=own.LEGACY_PLUS_ONE
        )
        ret["box_gradient_limit"] = own.BOX_GRAD_CLIP
        ret["relabel_from_rois"] = own.RPN_RELABEL_FROM_ROIS
        return ret

    def forward(
        self,
        images: ImageList,
        features: Dict[str, Tensor],
        gt_instances: Optional[List[Instances]] = None,
        sample: Optional[Sample] = None,
    ) -> Tuple[List[Instances], Dict[str, Tensor]]:
        """As in the base class, with boxes that have a gradient.

        Args:
            sample: in training, makes the samples of the next stage from the proposals and the
                ground truth; they are returned instead of the proposals. Without it no anchor is
                relabelled.
        """
        anchors, logits, deltas, grid = self.predict_anchors(features)
        limit = (self.box_gradient_limit or 0) / len(deltas)
        limited = limit_gradient(deltas, limit)
        proposals = [
            self.propose(
                anchors, logits[i].detach(), limited[i], grid, size, self.min_size(images, i)
            )
            for i, size in enumerate(images.image_sizes)
        ]
        if not self.training:
            return proposals, {}
        labels, boxes = self.label_and_sample_anchors([anchors], gt_instances)
        if sample is not None:
            proposals = sample(proposals, gt_instances)
            if self.relabel_from_rois:
                labels = [
                    relabel_anchors(x, s, _inside(anchors.tensor, s.image_size))
                    for x, s in zip(labels, proposals)
                ]
        return proposals, self.losses([anchors], [logits], labels, [deltas], boxes)

    def propose(
        self,
        anchors: Boxes,
        logits: Tensor,
        deltas: Tensor,
        grid: Tuple[int, int],
        image_size: Tuple[int, int],
        min_size: float,
    ) -> Instances:
        with torch.no_grad():
            chosen = super().propose(anchors, logits, deltas, grid, image_size, min_size)
        if self.detach_boxes:
            return chosen
        index = chosen.anchor_index
        source = anchors.tensor[index]
        decoded = self.box2box_transform.apply_deltas(deltas[index], source)
        passes = _inside(source, image_size) & _inside(decoded, image_size)
        boxes = clip_boxes(decoded, image_size, whole_pixel=True)
        chosen.proposal_boxes = exact_boxes(torch.where(passes[:, None], boxes, boxes.detach()))
        return chosen

    def usable_anchors(
        self, grid: Tuple[int, int], image_size: Tuple[int, int], device: torch.device
    ) -> Tensor:
        stride = self.anchor_generator.strides[0]
        # The next multiple of the stride: sizes of the feature map are rounded up.
        covered = tuple(-(-side // stride) * stride for side in image_size)
        return super().usable_anchors(grid, covered, device)
