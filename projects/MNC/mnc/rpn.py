"""The first stage: a region proposal network whose boxes stay part of the graph, and which learns
from the boxes that the later stages were trained on (MNC paper, sections 3.1 and 4)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.regions.batching import to_device
from d2ext.modeling.regions.boxes import boxes_inside, clip_boxes, sizes_of_rows
from d2ext.modeling.rpn.caffe import AnchorPredictions, CaffeRPN, IntOrTensor
from d2ext.projects.mnc.box_transform import MNCBoxTransform, exact_boxes
from d2ext.projects.mnc.gradient_limit import limit_gradient

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Instances


def relabel_anchors(labels: Tensor, samples: Instances, inside: Tensor) -> Tensor:
    """Anchor labels that agree with the sampled boxes.

    Args:
        labels: (A,) in {-1, 0, 1}.
        samples: with `anchor_index` (-1 for none) and `foreground` (bool).
        inside: (A,) bool; other anchors keep their label.

    Returns:
        (A,) labels; anchors of background boxes are 0, those of foreground boxes 1.
    """
    anchors, nowhere = samples.anchor_index, len(labels)
    known = (anchors >= 0) & inside[anchors.clamp(min=0)]
    labels = F.pad(labels, (0, 1))
    for chosen, value in ((~samples.foreground, 0), (samples.foreground, 1)):
        labels = labels.index_fill(0, anchors.masked_fill(~(known & chosen), nowhere), value)
    return labels[:nowhere]


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
        box_gradient_limit: float | None = 1 / 512,
        relabel_from_rois: bool = True,
        normalize_box_by_sampled: bool = True,
        scale_min_size: bool = False,
        **kwargs,
    ):
        """
        Args:
            box_gradient_limit: the gradient that reaches the deltas through the proposals
                is clipped to this, elementwise, for each image before the images are averaged;
                None or 0 for no limit. The gradient of the RPN's own losses is not clipped.
            relabel_from_rois: anchors whose proposals are sampled for the later stages take
                part in the RPN's losses with the labels of these samples.
            scale_min_size: `min_box_size` counts pixels of the original image instead of
                the network input.
            normalize_box_by_sampled, kwargs: see `CaffeRPN`.
        """
        super().__init__(normalize_box_by_sampled=normalize_box_by_sampled, **kwargs)
        self.box_gradient_limit = box_gradient_limit
        self.relabel_from_rois = relabel_from_rois
        self.scale_min_size = scale_min_size

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own = cfg.MODEL.MNC
        ret = super().from_config(cfg, input_shape)
        ret["box2box_transform"] = MNCBoxTransform(
            cfg.MODEL.RPN.BBOX_REG_WEIGHTS, plus_one=own.LEGACY_PLUS_ONE
        )
        ret["box_gradient_limit"] = own.BOX_GRAD_CLIP
        ret["relabel_from_rois"] = own.RPN_RELABEL_FROM_ROIS
        ret["scale_min_size"] = cfg.MODEL.CAFFE_RPN.SCALE_MIN_SIZE
        return ret

    def propose(
        self,
        predictions: AnchorPredictions,
        image_sizes: Sequence[tuple[int, int]],
        scales: Sequence[float] | None = None,
    ) -> list[Instances]:
        """As in the base class, with boxes that have a gradient.

        Args:
            scales: pixels of the network input per pixel of each original image; None for 1.
        """
        limit = (self.box_gradient_limit or 0) / len(image_sizes)
        deltas = limit_gradient(predictions.deltas, limit)
        proposals = []
        for image, size in enumerate(image_sizes):
            scale = scales[image] if self.scale_min_size and scales is not None else 1.0
            proposals.append(
                self.propose_in_image(predictions, image, size, self.min_box_size * scale)
            )
        counts = [len(p) for p in proposals]
        sizes, device = sizes_of_rows(image_sizes, counts), deltas.device
        image = to_device(np.arange(len(counts)).repeat(counts), device)
        anchor = torch.cat([p.anchor_index for p in proposals])
        source = predictions.anchors.tensor[anchor]
        decoded = self.box2box_transform.apply_deltas(deltas[image, anchor], source)
        passes = boxes_inside(source, sizes) & boxes_inside(decoded, sizes)
        boxes = clip_boxes(decoded, sizes, whole_pixel=True)
        boxes = torch.where(passes[:, None], boxes, boxes.detach())
        for proposal, own in zip(proposals, boxes.split(counts)):
            proposal.proposal_boxes = exact_boxes(own)
        return proposals

    def losses_with_samples(
        self,
        predictions: AnchorPredictions,
        targets: list[Instances],
        samples: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Losses of the anchors, some of which get the labels of the samples of the next stage.

        Args:
            samples: per image, see `relabel_anchors`.
        """
        labels, boxes = self.label_and_sample_anchors([predictions.anchors], targets)
        if self.relabel_from_rois:
            anchors = predictions.anchors.tensor
            labels = [
                relabel_anchors(x, s, boxes_inside(anchors, s.image_size))
                for x, s in zip(labels, samples)
            ]
        return self.anchor_losses(predictions, labels, boxes)

    def covered_cells(self, side: IntOrTensor) -> IntOrTensor:
        # Sizes of the feature map are rounded up.
        stride = self.anchor_generator.strides[0]
        return (side + stride - 1) // stride
