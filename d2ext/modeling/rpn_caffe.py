"""The region proposal network of the Caffe lineage (Faster R-CNN's release), from which those of
MNC and FCIS differ in a few constants only."""

from typing import Dict, List, Optional, Tuple

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from d2ext.errors import UserError
from d2ext.structures import clip_boxes

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

from .box_refinement import ClampedBox2BoxTransform
from .losses import divide_by_count
from .rpn import InsideAnchorRPN

__all__ = ["CaffeRPN"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class CaffeRPN(InsideAnchorRPN):
    """RPN on one feature map with the rules of Faster R-CNN's Caffe release.

    * An anchor takes part in training if its pixels are in the image: one that touches the right or
      lower border does (detectron2's ``inside_box`` excludes it).
    * A ground truth makes all its best anchors positive, whatever their IoU; the regression target
      of an anchor is the ground truth that it overlaps most.
    * Losses are averages per image, then over images. So an image has the same weight in any batch.
    * Boxes are decoded without a limit to their growth, clipped, and those with a side below the
      minimum are removed *before* the best are selected (detectron2: afterwards).
    * Proposals come from the ``floor(H / stride) x floor(W / stride)`` first cells, so cells in the
      padding of a batch give none.
    """

    @configurable
    def __init__(
        self,
        *,
        match_zero_overlap: bool = True,
        normalize_box_by_sampled: bool = False,
        crop_grid: bool = True,
        scale_min_size: bool = False,
        detach_boxes: bool = True,
        anchor_boundary_thresh: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            match_zero_overlap (bool): the release does not ask whether a ground truth has a best
                anchor at all: if none overlaps it, every anchor that overlaps nothing is positive.
                True repeats that, False leaves such a ground truth without an anchor.
            normalize_box_by_sampled (bool): divide the box loss by the number of sampled anchors
                (MNC) instead of by ``batch_size_per_image`` (FCIS).
            crop_grid (bool): see the class; False uses all cells.
            scale_min_size (bool): ``min_box_size`` counts pixels of the original image (MNC)
                instead of the network input. Needs ``images.scales``, see :meth:`min_size`.
            detach_boxes (bool): treat the proposals as constants. False keeps their gradient.
            anchor_boundary_thresh (float): pixels by which anchors may exceed the image in
                training; negative for no limit.
            kwargs: arguments of detectron2's RPN; ``anchor_matcher`` without low-quality matches.
        """
        super().__init__(
            low_quality_iou=None, anchor_boundary_thresh=anchor_boundary_thresh, **kwargs
        )
        if len(self.in_features) != 1:
            raise UserError(
                f"CaffeRPN works on one feature map, MODEL.RPN.IN_FEATURES names {self.in_features}"
            )
        if self.anchor_matcher.allow_low_quality_matches:
            raise UserError("CaffeRPN: give anchor_matcher allow_low_quality_matches=False.")
        self.match_zero_overlap = match_zero_overlap
        self.normalize_box_by_sampled = normalize_box_by_sampled
        self.crop_grid = crop_grid
        self.scale_min_size = scale_min_size
        self.detach_boxes = detach_boxes

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        rpn, own = cfg.MODEL.RPN, cfg.MODEL.CAFFE_RPN
        ret = super().from_config(cfg, input_shape)
        for name in ("low_quality_iou", "filter_before_matching", "normalize_by_sampled"):
            del ret[name]
        ret["anchor_matcher"] = Matcher(
            rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=False
        )
        limit = {} if own.CLAMP_DELTAS else {"scale_clamp": float("inf")}
        ret["box2box_transform"] = ClampedBox2BoxTransform(rpn.BBOX_REG_WEIGHTS, **limit)
        ret["anchor_boundary_thresh"] = own.BOUNDARY_THRESH
        ret["match_zero_overlap"] = own.MATCH_ZERO_OVERLAP
        ret["normalize_box_by_sampled"] = own.NORMALIZE_BOX_BY_SAMPLED
        ret["crop_grid"] = own.CROP_GRID
        ret["scale_min_size"] = own.SCALE_MIN_SIZE
        return ret

    def forward(
        self,
        images: ImageList,
        features: Dict[str, Tensor],
        gt_instances: Optional[List[Instances]] = None,
    ) -> Tuple[List[Instances], Dict[str, Tensor]]:
        """
        Args:
            images: N images; only their sizes are used, and ``scales`` with ``scale_min_size``.
            features: name -> N x C x h x w.
            gt_instances: in training, per image ``Instances`` with ``gt_boxes``.

        Returns:
            Per image ``Instances`` with ``proposal_boxes``, ``objectness_logits`` (descending) and
            ``anchor_index`` (int64, the anchor that each stems from); and the losses
            ``loss_rpn_cls`` and ``loss_rpn_loc``, none in inference.
        """
        anchors, logits, deltas, grid = self.predict_anchors(features)
        losses = {}
        if self.training:
            labels, boxes = self.label_and_sample_anchors([anchors], gt_instances)
            losses = self.losses([anchors], [logits], labels, [deltas], boxes)
        proposals = [
            self.propose(
                anchors, logits[i].detach(), deltas[i], grid, size, self.min_size(images, i)
            )
            for i, size in enumerate(images.image_sizes)
        ]
        return proposals, losses

    def predict_anchors(
        self, features: Dict[str, Tensor]
    ) -> Tuple[Boxes, Tensor, Tensor, Tuple[int, int]]:
        """The A anchors of the map, their logits (N x A) and deltas (N x A x 4) in float32 or
        float64, and the height and width of the map."""
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)[0]
        logits, deltas = (
            x[0].to(torch.promote_types(x[0].dtype, torch.float32)) for x in self.rpn_head(maps)
        )
        grid = logits.shape[-2:]
        logits = logits.permute(0, 2, 3, 1).flatten(1)
        deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        return anchors, logits, deltas, tuple(grid)

    # ------------------------------------------------------------------------------- training

    def _match(self, anchors: Boxes, gt: Instances) -> Tuple[Tensor, Tensor]:
        height, width = gt.image_size
        allowed = self.anchor_boundary_thresh
        x1, y1, x2, y2 = anchors.tensor.unbind(dim=1)
        inside = (x1 >= -allowed) & (y1 >= -allowed)
        inside &= (x2 <= width + allowed) & (y2 <= height + allowed)
        if allowed < 0:
            inside = torch.ones_like(inside)
        labels = torch.full((len(anchors),), -1, dtype=torch.int8, device=anchors.device)
        index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        labels[inside], index[inside] = self._match_all(anchors[inside], gt)
        return labels, index

    def _match_all(self, anchors: Boxes, gt: Instances) -> Tuple[Tensor, Tensor]:
        iou = pairwise_iou(gt.gt_boxes, anchors)
        index, labels = self.anchor_matcher(iou)
        if iou.numel():
            best = iou.max(dim=1, keepdim=True).values
            claimed = iou == best
            if not self.match_zero_overlap:
                claimed &= best > 0
            labels[claimed.any(dim=0)] = 1
        return labels, index

    def losses(
        self,
        anchors: List[Boxes],
        pred_objectness_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_anchor_deltas: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Arguments as in the base class, lists of one level; see the class for the averages."""
        labels, logits = torch.stack(gt_labels), pred_objectness_logits[0]
        valid, positive = labels >= 0, labels == 1
        self._log_samples(valid, positive)
        cls = F.binary_cross_entropy_with_logits(
            logits, positive.to(logits.dtype), reduction="none"
        )
        cls = (cls * valid).sum(dim=1)
        image, anchor = positive.nonzero(as_tuple=True)
        # Only positives have a target that is certain to be encodable.
        targets = self.box2box_transform.get_deltas(
            anchors[0].tensor[anchor], torch.stack(gt_boxes)[image, anchor]
        )
        box = smooth_l1_loss(
            pred_anchor_deltas[0][image, anchor], targets, self.smooth_l1_beta, reduction="none"
        )
        box = torch.zeros_like(cls).index_add(0, image, box.sum(dim=1))
        sampled = valid.sum(dim=1).clamp(min=1)
        wanted = sampled if self.normalize_box_by_sampled else self.batch_size_per_image
        losses = {"loss_rpn_cls": (cls / sampled).sum(), "loss_rpn_loc": (box / wanted).sum()}
        return {
            name: divide_by_count(loss, len(labels)) * self.loss_weight.get(name, 1.0)
            for name, loss in losses.items()
        }

    def _log_samples(self, valid: Tensor, positive: Tensor) -> None:
        positives, images = positive.sum().item(), len(valid)
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", positives / images)
        storage.put_scalar("rpn/num_neg_anchors", (valid.sum().item() - positives) / images)

    # ------------------------------------------------------------------------------- proposals

    def min_size(self, images: ImageList, image: int) -> float:
        """Least side of a proposal in pixels of the network input.

        With ``scale_min_size``, ``images.scales[image]`` is network pixels per original pixel; the
        detector attaches it in ``preprocess_image``. Without it the scale counts as 1.
        """
        scales = getattr(images, "scales", None)
        if not self.scale_min_size or scales is None:
            return self.min_box_size
        return self.min_box_size * float(scales[image])

    def propose(
        self,
        anchors: Boxes,
        logits: Tensor,
        deltas: Tensor,
        grid: Tuple[int, int],
        image_size: Tuple[int, int],
        min_size: float,
    ) -> Instances:
        """Proposals of one image.

        Args:
            anchors: A boxes, by row, column and anchor of the cell.
            logits, deltas (Tensor): (A,) and A x 4.
            grid: rows and columns of the feature map.
            image_size: height and width without padding.
            min_size (float): see :meth:`min_size`.
        """
        usable = self.usable_anchors(grid, image_size, anchors.device)
        boxes = self.decode(anchors.tensor[usable], deltas[usable], image_size)
        if self.detach_boxes:
            boxes = boxes.detach()
        kept = self.select(boxes.detach(), logits[usable], min_size)
        result = Instances(image_size)
        result.proposal_boxes = Boxes(boxes[kept])
        result.objectness_logits = logits[usable[kept]]
        result.anchor_index = usable[kept]
        return result

    def usable_anchors(
        self, grid: Tuple[int, int], image_size: Tuple[int, int], device: torch.device
    ) -> Tensor:
        """Ascending indices of the anchors whose cells give proposals."""
        stride = self.anchor_generator.strides[0]
        per_cell = self.anchor_generator.num_anchors[0]
        cells = torch.ones(*grid, per_cell, dtype=torch.bool, device=device)
        if self.crop_grid:
            cells[max(image_size[0] // stride, 1) :] = False
            cells[:, max(image_size[1] // stride, 1) :] = False
        return cells.flatten().nonzero()[:, 0]

    def decode(self, anchors: Tensor, deltas: Tensor, image_size: Tuple[int, int]) -> Tensor:
        """Boxes (A x 4) of anchors and deltas (A x 4 each), clipped to the image."""
        boxes = self.box2box_transform.apply_deltas(deltas, anchors)
        return clip_boxes(boxes, image_size, whole_pixel=True)

    @torch.no_grad()
    def select(self, boxes: Tensor, logits: Tensor, min_size: float) -> Tensor:
        """Indices of the boxes to propose, best first.

        Raises:
            FloatingPointError: in training, if a box or logit is not finite.
        """
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(logits)
        if self.training and not finite.all():
            raise FloatingPointError(
                "Proposals contain Inf or NaN: training diverged, lower the learning rate."
            )
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = ((sides >= min_size).all(dim=1) & finite).nonzero()[:, 0]
        order = logits[kept].sort(descending=True, stable=True).indices
        kept = kept[order[: self.pre_nms_topk[self.training]]]
        best = nms(boxes[kept], logits[kept], self.nms_thresh)
        return kept[best[: self.post_nms_topk[self.training]]]
