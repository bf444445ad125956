"""The region proposal network of the Caffe lineage (Faster R-CNN's release), from which those of
MNC and FCIS differ in a few constants only."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from d2ext.errors import UserError
from d2ext.modeling.regions.batching import true_rows
from d2ext.modeling.regions.boxes import boxes_inside, clip_boxes, not_finite
from d2ext.modeling.regions.losses import divide_by_count
from d2ext.modeling.regions.refinement import ClampedBox2BoxTransform
from d2ext.modeling.rpn.seeded import SeededRPN

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


class AnchorPredictions(NamedTuple):
    """What the network says of all anchors of N images."""

    anchors: Boxes  # A, by row, column and anchor of the cell
    logits: Tensor  # N x A, float32 or float64
    deltas: Tensor  # N x A x 4
    grid: tuple[int, int]  # rows and columns of the feature map


@PROPOSAL_GENERATOR_REGISTRY.register()
class CaffeRPN(SeededRPN):
    """RPN on one feature map with the rules of Faster R-CNN's Caffe release.

    * An anchor takes part in training if its pixels are in the image: one that touches the right or
      lower border does (detectron2's `inside_box` excludes it).
    * A ground truth makes all its best anchors positive, whatever their IoU; the regression target
      of an anchor is the ground truth that it overlaps most.
    * Losses are averages per image, then over images. So an image has the same weight in any batch.
    * Boxes are decoded without a limit to their growth, clipped, and those with a side below the
      minimum are removed *before* the best are selected (detectron2: afterwards).
    * Proposals come from the `floor(H / stride) x floor(W / stride)` first cells, so cells in the
      padding of a batch give none.
    """

    @configurable
    def __init__(
        self, *, match_zero_overlap: bool = True, normalize_box_by_sampled: bool = False, **kwargs
    ):
        """
        Args:
            match_zero_overlap: the release does not ask whether a ground truth has a best
                anchor at all: if none overlaps it, every anchor that overlaps nothing is positive.
                True repeats that, False leaves such a ground truth without an anchor.
            normalize_box_by_sampled: divide the box loss by the number of sampled anchors
                (MNC) instead of by `batch_size_per_image` (FCIS).
            kwargs: arguments of detectron2's RPN; `anchor_matcher` without low-quality matches.
        """
        super().__init__(**kwargs)
        if len(self.in_features) != 1:
            raise UserError(
                f"CaffeRPN works on one feature map, MODEL.RPN.IN_FEATURES names {self.in_features}"
            )
        self.match_zero_overlap = match_zero_overlap
        self.normalize_box_by_sampled = normalize_box_by_sampled

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own = cfg.MODEL.CAFFE_RPN
        ret = super().from_config(cfg, input_shape)
        limit = {} if own.CLAMP_DELTAS else {"scale_clamp": float("inf")}
        ret["box2box_transform"] = ClampedBox2BoxTransform(cfg.MODEL.RPN.BBOX_REG_WEIGHTS, **limit)
        ret["match_zero_overlap"] = own.MATCH_ZERO_OVERLAP
        ret["normalize_box_by_sampled"] = own.NORMALIZE_BOX_BY_SAMPLED
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: N images; only their sizes are used.
            features: name -> N x C x h x w.
            gt_instances: in training, per image `Instances` with `gt_boxes`.

        Returns:
            Per image `Instances` with `proposal_boxes`, `objectness_logits` (descending) and
            `anchor_index` (int64, the anchor that each stems from); and the losses
            `loss_rpn_cls` and `loss_rpn_loc`, none in inference.
        """
        predictions = self.predict_anchors(features)
        losses = {}
        if self.training:
            labels, boxes = self.label_and_sample_anchors([predictions.anchors], gt_instances)
            losses = self.anchor_losses(predictions, labels, boxes)
        return self.propose(predictions, images.image_sizes), losses

    def predict_anchors(self, features: dict[str, Tensor]) -> AnchorPredictions:
        """What the network says of the anchors of its feature map."""
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)[0]
        logits, deltas = (
            x[0].to(torch.promote_types(x[0].dtype, torch.float32)) for x in self.rpn_head(maps)
        )
        grid = tuple(logits.shape[-2:])
        logits = logits.permute(0, 2, 3, 1).flatten(1)
        deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        return AnchorPredictions(anchors, logits, deltas, grid)

    # ------------------------------------------------------------------------------- training

    def inside(self, anchors: Boxes, image_size: tuple[int, int]) -> Tensor:
        """Those of which every pixel is in the image."""
        return boxes_inside(anchors.tensor, image_size)

    def match(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """By the matcher's thresholds; all best anchors of a ground truth are positive."""
        index, labels = self.label_by_thresholds(iou)
        best = iou.amax(dim=1, keepdim=True)
        claimed = iou == best
        if not self.match_zero_overlap:
            claimed &= best > 0
        return index, labels.masked_fill(claimed.any(dim=0), 1)

    def anchor_losses(
        self, predictions: AnchorPredictions, labels: list[Tensor], boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        """Losses of what `label_and_sample_anchors` returns, see `losses`."""
        anchors, logits, deltas, _ = predictions
        return self.losses([anchors], [logits], labels, [deltas], boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Arguments as in the base class, lists of one level; see the class for the averages."""
        labels, logits = torch.stack(gt_labels), pred_objectness_logits[0]
        valid, positive = labels >= 0, labels == 1
        sampled = valid.sum(dim=1)
        num_valid, num_positive = torch.stack([sampled.sum(), positive.sum()]).tolist()
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", num_positive / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (num_valid - num_positive) / len(labels))
        cls = F.binary_cross_entropy_with_logits(
            logits, positive.to(logits.dtype), reduction="none"
        )
        cls = (cls * valid).sum(dim=1)
        rows = true_rows(positive.flatten(), num_positive)
        image, anchor = rows.div(labels.shape[1], rounding_mode="floor"), rows % labels.shape[1]
        # Only positives have a target that is certain to be encodable.
        targets = self.box2box_transform.get_deltas(
            anchors[0].tensor[anchor], torch.stack(gt_boxes)[image, anchor]
        )
        box = smooth_l1_loss(
            pred_anchor_deltas[0][image, anchor], targets, self.smooth_l1_beta, reduction="none"
        )
        box = torch.zeros_like(cls).index_add(0, image, box.sum(dim=1))
        sampled = sampled.clamp(min=1)
        wanted = sampled if self.normalize_box_by_sampled else self.batch_size_per_image
        losses = {"loss_rpn_cls": (cls / sampled).sum(), "loss_rpn_loc": (box / wanted).sum()}
        return {
            name: divide_by_count(loss, len(labels)) * self.loss_weight.get(name, 1.0)
            for name, loss in losses.items()
        }

    # ------------------------------------------------------------------------------- proposals

    def propose(
        self, predictions: AnchorPredictions, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Proposals of all images, which are constants.

        Args:
            image_sizes: height and width of each image without padding.
        """
        return [
            self.propose_in_image(predictions, image, size, self.min_box_size)
            for image, size in enumerate(image_sizes)
        ]

    @torch.no_grad()
    def propose_in_image(
        self,
        predictions: AnchorPredictions,
        image: int,
        image_size: tuple[int, int],
        min_size: float,
    ) -> Instances:
        """Proposals of one image.

        Args:
            image: position in the batch.
            image_size: height and width without padding.
            min_size: least side in pixels of the network input.
        """
        anchors, logits, deltas = predictions.anchors, predictions.logits, predictions.deltas
        usable = self.usable_anchors(predictions.grid, image_size, anchors.device)
        boxes = self.decode(anchors.tensor[usable], deltas[image, usable], image_size)
        kept = self.select(boxes, logits[image, usable], min_size)
        result = Instances(image_size)
        result.proposal_boxes = Boxes(boxes[kept])
        result.anchor_index = usable[kept]
        result.objectness_logits = logits[image, result.anchor_index]
        return result

    def usable_anchors(
        self, grid: tuple[int, int], image_size: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Ascending indices of the anchors whose cells give proposals."""
        per_cell = self.anchor_generator.num_anchors[0]
        rows, columns = (
            torch.arange(min(max(self.covered_cells(side), 1), cells), device=device)
            for side, cells in zip(image_size, grid)
        )
        cells = rows[:, None] * grid[1] + columns
        return (cells[..., None] * per_cell + torch.arange(per_cell, device=device)).flatten()

    def covered_cells(self, side: IntOrTensor) -> IntOrTensor:
        """How many cells of a row or column give proposals, for a side in pixels."""
        return side // self.anchor_generator.strides[0]

    def decode(self, anchors: Tensor, deltas: Tensor, image_size: tuple[int, int]) -> Tensor:
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
        large = ((boxes[:, 2:] - boxes[:, :2]) >= min_size).all(dim=1) & finite
        all_finite, count = torch.stack([finite.all(), large.sum()]).tolist()
        if self.training and not all_finite:
            raise not_finite("Proposals", logits)
        order = logits.masked_fill(~large, -torch.inf).sort(descending=True, stable=True).indices
        kept = order[: min(count, self.pre_nms_topk[self.training])]
        best = nms(boxes[kept], logits[kept], self.nms_thresh)
        return kept[best[: self.post_nms_topk[self.training]]]
