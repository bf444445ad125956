"""Test-time augmentation: several sizes of each image and their mirror images, merged.

`with_test_time_augmentation` wraps any model whose output are detectron2's `Instances`.
"""

from collections.abc import Callable, Sequence

import torch
from fvcore.transforms import HFlipTransform, NoOpTransform
from torch import Tensor, nn

from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeTransform
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances, pairwise_iou


def with_test_time_augmentation(
    model: nn.Module,
    *,
    min_sizes: Sequence[int],
    max_size: int,
    flip: bool = True,
) -> nn.Module:
    """A module with the interface of `model` that runs it on several views of each image.

    Which way depends on the model: one with a method `with_test_time_augmentation(tta_mapper)`
    says itself; a `GeneralizedRCNN` with detectron2's inference and region masks runs in
    detectron2's `GeneralizedRCNNWithTTA`, which averages mask probabilities, and merges boxes by
    Soft-NMS where the region heads do; the results of any other model are merged by
    `MergedViewsTTA`. As in detectron2, the views are made of the image as it was loaded, at the
    test size.

    Args:
        model: in evaluation mode; parallel wrappers are taken off.
        min_sizes: short sides of the views in pixels.
        max_size: limit of their long side.
        flip: mirror each size as well.

    Raises:
        UserError: no size is given.
    """
    if not list(min_sizes):
        raise UserError(
            "test-time augmentation needs a size: set TEST.AUG.MIN_SIZES (yaml) or "
            "train.test_aug.min_sizes (lazy)"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    mapper = DatasetMapperTTA(min_sizes=list(min_sizes), max_size=max_size, flip=flip)
    if hasattr(model, "with_test_time_augmentation"):
        return model.with_test_time_augmentation(mapper)
    if _is_plain_rcnn(model):
        return _RCNNWithTTA(_test_settings(model.roi_heads), model, mapper)
    return MergedViewsTTA(model, mapper)


def _is_plain_rcnn(model: nn.Module) -> bool:
    """Whether the results of a model are those of its region heads, pasted as detectron2 does."""
    return (
        isinstance(model, GeneralizedRCNN)
        and type(model).inference is GeneralizedRCNN.inference
        and type(model)._postprocess is GeneralizedRCNN._postprocess
        and hasattr(model.roi_heads, "forward_with_given_boxes")
        and hasattr(model.roi_heads, "box_predictor")
        and not getattr(model.roi_heads, "keypoint_on", False)
    )


def _test_settings(roi_heads: nn.Module) -> CfgNode:
    """What `GeneralizedRCNNWithTTA` reads from a config, taken from the model instead, so that it
    serves lazy configs as well."""
    predictor = roi_heads.box_predictor
    if isinstance(predictor, nn.ModuleList):
        predictor = predictor[-1]
    return CfgNode(
        {
            "MODEL": {
                "KEYPOINT_ON": False,
                "LOAD_PROPOSALS": False,
                "MASK_ON": bool(roi_heads.mask_on),
                "ROI_HEADS": {
                    "NUM_CLASSES": roi_heads.num_classes,
                    "NMS_THRESH_TEST": predictor.test_nms_thresh,
                },
            },
            "TEST": {"DETECTIONS_PER_IMAGE": predictor.test_topk_per_image},
        }
    )


def _with_size(x: dict) -> dict:
    """An input with the size of the output, which is optional in a model's input."""
    return {"height": x["image"].shape[1], "width": x["image"].shape[2], **x}


class _RCNNWithTTA(GeneralizedRCNNWithTTA):
    """detectron2's class, as a model that takes what its model takes."""

    @torch.no_grad()
    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        return super().__call__([_with_size(x) for x in batched_inputs])

    def _merge_detections(self, all_boxes, all_scores, all_classes, shape_hw) -> Instances:
        """As in detectron2, with the Soft-NMS of region heads that have it."""
        soft = getattr(self.model.roi_heads, "soft_nms", None)
        if not soft:
            return super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        boxes = Boxes(all_boxes)
        boxes.clip(shape_hw)
        rows, scores = soft(boxes.tensor, all_scores, all_classes)
        found = Instances(
            shape_hw, pred_boxes=boxes[rows], scores=scores, pred_classes=all_classes[rows]
        )
        most = self.cfg.TEST.DETECTIONS_PER_IMAGE
        return found[:most] if most >= 0 else found


class MergedViewsTTA(nn.Module):
    """Runs a model on all views and merges its finished results at the size of the output.

    Nothing is known of the model but its output, so masks are merged after their binarisation.
    """

    def __init__(
        self,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]],
        *,
        iou_threshold: float = 0.5,
        max_detections: int | None = None,
    ):
        """
        Args:
            model: in evaluation mode; its results have `pred_boxes`, `scores`, `pred_classes`
                and, optionally, `pred_masks` (N x H x W bool).
            tta_mapper: like detectron2's `DatasetMapperTTA`, makes a list of resized or mirrored
                inputs, each with the `transforms` that led to it.
            iou_threshold, max_detections: see `merge_views`.
        """
        super().__init__()
        self.model = model
        self.tta_mapper = tta_mapper
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Inputs and outputs of the model, with nothing but "instances" in the outputs."""
        return [{"instances": self._one_image(_with_size(x))} for x in batched_inputs]

    def _one_image(self, x: dict) -> Instances:
        views = []
        for view in self.tta_mapper(x):
            mirrored = is_mirrored(view.pop("transforms"))
            found = self.model([view])[0]["instances"]
            views.append(_mirror(found) if mirrored else found)
        return merge_views(views, self.iou_threshold, self.max_detections)


def is_mirrored(transforms) -> bool:
    """Whether a list of resizings and mirrorings mirrors in the end.

    A model undoes resizing itself: its results are of the size of the original image.

    Raises:
        UserError: the list does anything else, which cannot be undone.
    """
    mirrored = False
    for t in transforms.transforms:
        if isinstance(t, HFlipTransform):
            mirrored = not mirrored
        elif not isinstance(t, (ResizeTransform, NoOpTransform)):
            raise UserError(
                f"test-time augmentation can undo resizing and mirroring, not {type(t).__name__}"
            )
    return mirrored


def mirror_boxes(boxes: Tensor, extent: float) -> Tensor:
    """Boxes (R x 4) in the mirror image.

    Args:
        extent: the width of the image for continuous corners, one less for first and last pixels.
    """
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([extent - x2, y1, extent - x1, y2], dim=1)


def _mirror(found: Instances) -> Instances:
    """The same results in the mirror image; boxes are in continuous coordinates."""
    mirrored = Instances(found.image_size, **found.get_fields())
    mirrored.pred_boxes = Boxes(mirror_boxes(found.pred_boxes.tensor, found.image_size[1]))
    if found.has("pred_masks"):
        mirrored.pred_masks = found.pred_masks.flip(dims=[-1])
    return mirrored


def merge_views(
    views: Sequence[Instances],
    iou_threshold: float = 0.5,
    max_detections: int | None = None,
) -> Instances:
    """Merge results for several views of one image, all mapped back to it.

    Taken by falling score, a detection joins the group of its class whose first member overlaps its
    box most, by at least `iou_threshold`, and that has none of its own view yet: what one view
    holds for two objects stays two objects. Otherwise it starts a group. A group becomes one
    detection, with the score of its first member, the mean of its boxes weighted by their scores,
    and the pixels that have at least half of the weight in its masks.

    Args:
        views: fields as for `MergedViewsTTA`. The only view is returned as it is.
        max_detections: keep so many of highest score; None for as many as the largest view has.

    Returns:
        by falling score.
    """
    if len(views) == 1:
        return views[0]
    limit = max(len(v) for v in views) if max_detections is None else max_detections
    boxes = torch.cat([v.pred_boxes.tensor for v in views])
    scores = torch.cat([v.scores for v in views])
    classes = torch.cat([v.pred_classes for v in views])
    view_of = [i for i, v in enumerate(views) for _ in range(len(v))]
    masks = torch.cat([v.pred_masks for v in views]) if views[0].has("pred_masks") else None

    groups = _group(boxes, scores, classes, view_of, iou_threshold)[:limit]
    first = torch.tensor([g[0] for g in groups], dtype=torch.int64, device=boxes.device)
    merged = Instances(views[0].image_size)
    merged.pred_boxes = Boxes(boxes[first].clone())
    merged.scores, merged.pred_classes = scores[first], classes[first]
    if masks is not None:
        merged.pred_masks = masks[first]
    for row, group in enumerate(groups):
        if len(group) == 1:
            continue
        weights = scores[group] / scores[group].sum()
        merged.pred_boxes.tensor[row] = weights @ boxes[group]
        if masks is not None:
            vote = torch.tensordot(weights, masks[group].to(weights.dtype), 1) >= 0.5
            if vote.any():  # else masks that have nothing in common: keep the first
                merged.pred_masks[row] = vote
    return merged


def _group(
    boxes: Tensor, scores: Tensor, classes: Tensor, view_of: list[int], threshold: float
) -> list[list[int]]:
    """Groups of rows as described at `merge_views`, the highest-scoring row first in each."""
    overlap = pairwise_iou(Boxes(boxes), Boxes(boxes))
    overlap[classes[:, None] != classes[None]] = -1.0
    overlap = overlap.cpu()
    groups: list[list[int]] = []
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        best, best_overlap = None, threshold
        row = overlap[i, [g[0] for g in groups]].tolist() if groups else []
        for group, value in zip(groups, row):
            if value >= best_overlap and all(view_of[j] != view_of[i] for j in group):
                if best is None or value > best_overlap:
                    best, best_overlap = group, value
        if best is None:
            groups.append([i])
        else:
            best.append(i)
    return groups
