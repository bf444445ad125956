"""The region heads of FCIS: position-sensitive score maps shared by detection and segmentation, on
which the only work per region is to assemble and compare (paper, section 2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2ext.errors import UserError
from d2ext.modeling import ClampedBox2BoxTransform
from d2ext.modeling.regions.boxes import clip_boxes, pixel_boxes, to_inclusive
from d2ext.modeling.regions.losses import connect_features, divide_by_count
from d2ext.modeling.regions.samples import Samples, positive_rows
from d2ext.modeling.regions.targets import gt_bitmaps, pack_masks, resize_masks
from d2ext.ops import MaskVoting, fcis_joint_head, ps_roi_assemble, ps_roi_mean
from d2ext.ops.poolers import boxes_to_rois
from d2ext.projects.fcis.losses import RegionLosses, hardest_regions, region_losses, total_losses
from d2ext.projects.fcis.sampler import RegionSampler

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

Features = dict[str, Tensor]


class ScoreMaps(NamedTuple):
    """Outputs of the convolutions. `score`: N x 2(K + 1)k^2 x h x w, by class, side (outside,
    inside) and part; `box`: N x 4k^2 x h x w, by coordinate and part."""

    score: Tensor
    box: Tensor


class RegionScores(NamedTuple):
    """What R regions read from the maps: class logits R x (K + 1), background last; mask logits
    R x 2 x P x P (outside, inside) of the class `picked` (R,); deltas R x 4; and the first and
    last pixels (R x 4, not rounded) of the regions, which all that follows is counted in."""

    logits: Tensor
    seg: Tensor
    picked: Tensor
    deltas: Tensor
    pixel_boxes: Tensor


@ROI_HEADS_REGISTRY.register()
class FCISROIHeads(nn.Module):
    """Class, mask and box of regions from position-sensitive maps; no layer runs per region.

    Parameters: `conv_new`, `cls_seg` and `bbox`, convolutions with bias. The background is
    the last class in all of them. Losses: `loss_cls`, `loss_mask`, `loss_box_reg`, averages
    per image and then over images.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        in_feature: str = "res5",
        in_channels: int = 2048,
        stride: int = 16,
        conv_dim: int = 1024,
        conv_kernel: int = 1,
        group_size: int = 7,
        out_size: int = 21,
        joint: bool = True,
        inclusive: bool = True,
        sampler: RegionSampler,
        ohem: bool = True,
        batch_size_per_image: int = 128,
        loss_weights: Sequence[float] = (1.0, 10.0, 1.0),
        box2box_transform: Box2BoxTransform,
        smooth_l1_beta: float = 1.0,
        mask_target_thresh: float = 0.4,
        refine: bool = True,
        min_size_test: float = 2.0,
        vote: bool = True,
        voting: MaskVoting,
    ):
        """
        Args:
            num_classes: K, without background.
            in_feature, in_channels, stride: name, channels and stride of the feature map.
            conv_dim, conv_kernel: the convolution before the maps.
            group_size: k, parts per side of a region.
            out_size: P, cells per side of an assembled region; at least k.
            joint: one set of maps for both tasks (section 2.2). False: of each pair, the
                first map classifies (mean over the region) and the second segments (sigmoid).
            inclusive: round the corners of regions to first and last pixels, as released.
            sampler: labels the training regions.
            ohem: compute the losses of all of them and keep the hardest.
            batch_size_per_image: number of regions that train; `sampler` draws them without
                `ohem`.
            loss_weights: factors of class, mask and box loss, also for the choice of the hardest.
            box2box_transform: codec of the deltas.
            smooth_l1_beta: of the box loss.
            mask_target_thresh: resized ground-truth masks from here on are inside.
            refine: score the refined boxes at test time, too.
            min_size_test: least side of a region at test time, network pixels.
            vote: merge masks by voting; False: the mask of the best region stands.
            voting: suppression, voting and their thresholds.
        """
        super().__init__()
        self.num_classes = num_classes
        self.in_feature = in_feature
        self.scale = 1.0 / stride
        self.group_size = group_size
        self.out_size = out_size
        self.joint = joint
        self.inclusive = inclusive
        self.sampler = sampler
        self.ohem = ohem
        self.batch_size_per_image = batch_size_per_image
        self.loss_weights = list(loss_weights)
        self.box2box_transform = box2box_transform
        self.smooth_l1_beta = smooth_l1_beta
        self.mask_target_thresh = mask_target_thresh
        self.refine = refine
        self.min_size_test = min_size_test
        self.vote = vote
        self.voting = voting
        if len(self.loss_weights) != 3:
            raise UserError(f"MODEL.FCIS.LOSS_WEIGHTS {self.loss_weights} are not 3 numbers")
        if group_size < 1:
            raise UserError(f"MODEL.FCIS.GROUP_SIZE {group_size} must be at least 1")
        if out_size < group_size:
            raise UserError(
                f"MODEL.FCIS.OUT_SIZE {out_size} must be at least GROUP_SIZE {group_size}"
            )

        parts = group_size * group_size
        self.conv_new = Conv2d(
            in_channels, conv_dim, conv_kernel, padding=conv_kernel // 2, activation=nn.ReLU()
        )
        self.cls_seg = Conv2d(conv_dim, 2 * (num_classes + 1) * parts, 1)
        self.bbox = Conv2d(conv_dim, 4 * parts, 1)
        for layer in (self.conv_new, self.cls_seg, self.bbox):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own, heads, box = cfg.MODEL.FCIS, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        if len(heads.IOU_THRESHOLDS) != 1:
            raise UserError("FCISROIHeads needs one value in MODEL.ROI_HEADS.IOU_THRESHOLDS")
        limit = {} if own.CLAMP_DELTAS else {"scale_clamp": float("inf")}
        shape = input_shape[own.IN_FEATURE]
        return {
            "num_classes": heads.NUM_CLASSES,
            "in_feature": own.IN_FEATURE,
            "in_channels": shape.channels,
            "stride": shape.stride,
            "conv_dim": own.CONV_DIM,
            "conv_kernel": own.CONV_KERNEL,
            "group_size": own.GROUP_SIZE,
            "out_size": own.OUT_SIZE,
            "joint": own.JOINT,
            "inclusive": own.INCLUSIVE,
            "sampler": RegionSampler(
                num_classes=heads.NUM_CLASSES,
                iou_threshold=heads.IOU_THRESHOLDS[0],
                batch_size_per_image=-1 if own.OHEM else heads.BATCH_SIZE_PER_IMAGE,
                positive_fraction=heads.POSITIVE_FRACTION,
                background_iou=own.BACKGROUND_IOU,
                append_gt=heads.PROPOSAL_APPEND_GT,
            ),
            "ohem": own.OHEM,
            "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "loss_weights": own.LOSS_WEIGHTS,
            "box2box_transform": ClampedBox2BoxTransform(box.BBOX_REG_WEIGHTS, **limit),
            "smooth_l1_beta": box.SMOOTH_L1_BETA,
            "refine": own.REFINE,
            "min_size_test": own.MIN_SIZE_TEST,
            "vote": own.VOTE,
            "voting": MaskVoting(
                mode="fcis",
                nms_threshold=heads.NMS_THRESH_TEST,
                merge_threshold=own.MERGE_IOU,
                binary_threshold=own.BINARY_THRESH,
                max_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                score_threshold=heads.SCORE_THRESH_TEST,
            ),
        }

    def forward(
        self,
        images,
        features: Features,
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ):
        """
        Args:
            images: unused.
            features: name -> N x C x h x w.
            proposals: per image, with `proposal_boxes`.
            targets: in training, per image: `gt_boxes`, `gt_classes`, `gt_masks`.

        Returns:
            Training: (proposals, dict of losses). Inference: (list[Instances], {}), the results of
            `predict`.
        """
        del images
        if self.training:
            return proposals, self.losses(features, proposals, targets)
        return self.predict(features, proposals), {}

    def score_maps(self, features: Features) -> ScoreMaps:
        """The maps of all images."""
        x = self.conv_new(features[self.in_feature])
        return ScoreMaps(self.cls_seg(x), self.bbox(x))

    def score_regions(
        self, maps: ScoreMaps, boxes: Sequence[Boxes], pick: Tensor | None = None
    ) -> RegionScores:
        """
        Args:
            boxes: per image, in pixels of the network input.
            pick: (R,) class of each mask; -1 for none. None takes the best class of each
                region, the background left out.
        """
        rois = boxes_to_rois(boxes, inclusive=self.inclusive).to(maps.score.device)
        arguments = (rois, self.scale, self.group_size, self.out_size)
        if self.joint:
            logits, seg, picked = fcis_joint_head(
                maps.score, *arguments, pick, inclusive=self.inclusive
            )
        else:
            logits, seg, picked = self._read_separate(maps.score, arguments, pick)
        deltas = ps_roi_mean(maps.box, *arguments, inclusive=self.inclusive)
        pixels = rois[:, 1:] if self.inclusive else to_inclusive(rois[:, 1:])
        return RegionScores(logits.float(), seg.float(), picked, deltas.float(), pixels)

    def _read_separate(self, score: Tensor, arguments, pick: Tensor | None):
        pairs = score.unflatten(1, (self.num_classes + 1, 2, -1))
        detect, segment = (x.flatten(1, 2) for x in pairs.unbind(dim=2))
        logits = ps_roi_mean(detect.contiguous(), *arguments, inclusive=self.inclusive)
        if pick is None:
            pick = logits[:, : self.num_classes].argmax(dim=1)
        masks = ps_roi_assemble(segment.contiguous(), *arguments, inclusive=self.inclusive)
        rows = torch.arange(pick.shape[0], device=pick.device)
        inside = masks[rows, pick.clamp(min=0)]
        return logits, torch.stack([torch.zeros_like(inside), inside], dim=1), pick

    # -------------------------------------------------------------------------------- training

    def losses(
        self, features: Features, proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """The three weighted losses."""
        regions = self.sampler([p.proposal_boxes for p in proposals], targets, "regions")
        labels = torch.cat([r.gt_classes for r in regions])
        pick = torch.where(labels < self.num_classes, labels, -1)
        boxes = [r.proposal_boxes for r in regions]
        scores = self.score_regions(self.score_maps(features), boxes, pick)
        counts = [len(r) for r in regions]
        each = zip(
            *(x.split(counts) for x in self._region_losses(regions, targets, labels, scores))
        )
        losses, positives = [], []
        for image, own in zip(map(RegionLosses._make, each), labels.split(counts)):
            kept = slice(None)
            if self.ohem:
                kept = hardest_regions(image, self.loss_weights, self.batch_size_per_image)
            positives.append((own[kept] < self.num_classes).sum())
            losses.append(total_losses(image, kept, self.loss_weights, self.batch_size_per_image))
        positives = torch.stack(positives).sum().item()
        get_event_storage().put_scalar("roi_head/num_fg_samples", positives / len(regions))
        total = {
            name: divide_by_count(sum(loss[name] for loss in losses), len(losses))
            for name in losses[0]
        }
        return connect_features(total, features.values())

    def _region_losses(
        self,
        regions: list[Samples],
        targets: list[Instances],
        labels: Tensor,
        scores: RegionScores,
    ) -> RegionLosses:
        """Losses of the regions of all images, one by one."""
        positive, counts = positive_rows(regions, self.num_classes)
        boxes, gt_boxes = (
            torch.cat([r.get(name).tensor for r in regions])[positive]
            for name in ("proposal_boxes", "gt_boxes")
        )
        masks = pack_masks([gt_bitmaps(t) for t in targets])
        inside = resize_masks(
            masks.masks,
            masks.rows([r.gt_index[:n] for r, n in zip(regions, counts)]),
            pixel_boxes(boxes),
            self.out_size,
            self.mask_target_thresh,
            # A mask does not reach out of its own box, rounded.
            limits=pixel_boxes(gt_boxes),
        )
        deltas = self.box2box_transform.get_deltas(boxes, gt_boxes)
        return region_losses(
            scores.logits,
            scores.seg,
            scores.deltas,
            labels,
            inside,
            deltas,
            self.smooth_l1_beta,
            positive,
        )

    # ------------------------------------------------------------------------------- inference

    def predict_stages(
        self, features: Features, proposals: list[Instances]
    ) -> list[list[Instances]]:
        """Candidates (see there) of the proposals alone, and of proposals and refined boxes."""
        maps = self.score_maps(features)
        sizes = [p.image_size for p in proposals]
        boxes = [p.proposal_boxes for p in proposals]
        scores = self.score_regions(maps, boxes)
        pools = self._as_instances(scores, boxes, sizes)
        stages = [[self._large_enough(pool) for pool in pools]]
        if self.refine:
            boxes = self._refined(boxes, scores.deltas, sizes)
            moved = self._as_instances(self.score_regions(maps, boxes), boxes, sizes)
            pools = [Instances.cat(pair) for pair in zip(pools, moved)]
            stages.append([self._large_enough(pool) for pool in pools])
        return stages

    def candidates(self, features: Features, proposals: list[Instances]) -> list[Instances]:
        """All scored regions of each image, before suppression and voting.

        Returns:
            `pred_boxes` and `pixel_boxes` (R x 4) in pixels of the network
            input, the former continuous, the latter first and last pixels; `class_probs` (R x K,
            without the background) and `pred_masks` (R x 1 x P x P probabilities for each
            region's best class). Proposals come first, then their refined boxes.
        """
        return self.predict_stages(features, proposals)[-1]

    def predict(self, features: Features, proposals: list[Instances]) -> list[Instances]:
        """Detections without voting: after suppression per class each region keeps its box and
        mask. `pred_boxes`, `pixel_boxes`, `scores`, `pred_classes` and `pred_masks`
        (R x 1 x P x P); see `candidates`."""
        results = []
        for pool in self.candidates(features, proposals):
            seeds, classes = self.voting.choose_seeds(pool.pixel_boxes, pool.class_probs)
            result = pool[seeds]
            result.remove("class_probs")
            result.scores = pool.class_probs[seeds, classes]
            result.pred_classes = classes
            results.append(result)
        return results

    def forward_with_given_boxes(
        self, features: Features, instances: list[Instances]
    ) -> list[Instances]:
        """Add `pred_masks` (R x 1 x P x P probabilities) and `pixel_boxes` to instances with
        `pred_boxes` and `pred_classes`."""
        classes = torch.cat([x.pred_classes for x in instances])
        scores = self.score_regions(
            self.score_maps(features), [x.pred_boxes for x in instances], classes
        )
        counts = [len(x) for x in instances]
        masks = scores.seg.softmax(dim=1)[:, 1:].split(counts)
        for image, image_masks, pixels in zip(instances, masks, scores.pixel_boxes.split(counts)):
            image.pred_masks, image.pixel_boxes = image_masks, pixels
        return instances

    def _refined(
        self, boxes: list[Boxes], deltas: Tensor, sizes: list[tuple[int, int]]
    ) -> list[Boxes]:
        decoded = self.box2box_transform.apply_deltas(deltas, Boxes.cat(boxes).tensor)
        return [
            Boxes(clip_boxes(image_boxes, size, whole_pixel=True))
            for image_boxes, size in zip(decoded.split([len(b) for b in boxes]), sizes)
        ]

    def _as_instances(
        self, scores: RegionScores, boxes: list[Boxes], sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        counts = [len(b) for b in boxes]
        probs = scores.logits.softmax(dim=1)[:, : self.num_classes].split(counts)
        masks = scores.seg.softmax(dim=1)[:, 1:].split(counts)
        pixels = scores.pixel_boxes.split(counts)
        return [
            Instances(size, pred_boxes=b, pixel_boxes=x, class_probs=p, pred_masks=m)
            for size, b, x, p, m in zip(sizes, boxes, pixels, probs, masks)
        ]

    def _large_enough(self, pool: Instances) -> Instances:
        corners = pool.pred_boxes.tensor
        return pool[((corners[:, 2:] - corners[:, :2]) >= self.min_size_test).all(dim=1)]
