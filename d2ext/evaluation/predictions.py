"""What a model found, kept small until all images are done: arrays and run-length codes."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util

from d2ext.errors import UserError

from detectron2.structures import Instances


class ImageDetections(NamedTuple):
    """Detections in one image, in the order of the model."""

    image_id: object
    size: tuple[int, int]  # (height, width) of the image
    boxes: np.ndarray  # float32 (N, 4), x1 y1 x2 y2 with exclusive far edges
    scores: np.ndarray  # float32 (N,)
    classes: np.ndarray  # int64 (N,), contiguous
    masks: list[bytes] | None  # COCO's compressed run-length codes; None: a model without masks
    mask_scores: np.ndarray | None = None  # float32 (N,), of the masks; None: those of the boxes

    def rles(self) -> list[dict]:
        """Masks as pycocotools takes them."""
        return [{"size": list(self.size), "counts": counts} for counts in self.masks or ()]

    def scores_of(self, with_masks: bool) -> np.ndarray:
        """float32 (N,): the scores by which boxes, or masks, are ranked."""
        return self.mask_scores if with_masks and self.mask_scores is not None else self.scores


def _encode(masks) -> list[bytes]:
    """Run-length codes of bool (N, H, W) masks, one after the other to bound the memory."""
    codes = []
    for mask in masks:
        mask = np.asfortranarray(np.asarray(mask), dtype=np.uint8)
        codes.append(mask_util.encode(mask)["counts"])
    return codes


def _scores(instances: Instances, field: str, image_id) -> np.ndarray:
    """A field with one finite number per detection, float32 (N,)."""
    scores = instances.get(field).detach().cpu().numpy().astype(np.float32)
    if scores.shape != (len(instances),):
        raise UserError(
            f"'{field}' of image {image_id!r} has the shape {scores.shape} for "
            f"{len(instances)} detections; one number each is needed"
        )
    if not np.isfinite(scores).all():
        what = "score" if field == "scores" else "mask score"
        raise UserError(f"the model gave a {what} that is not finite for image {image_id!r}")
    return scores


def collect(instances: Instances, image_id) -> ImageDetections:
    """Compact copy of a model's output for one image.

    Args:
        instances: on any device, in image coordinates, with `pred_boxes`, `scores` (N,),
            `pred_classes` and, of a model with masks, `pred_masks` (N, H, W) at image resolution.
            A model that scores its masks apart from its boxes adds `mask_scores` (N,).
        image_id: of the data set's record.

    Raises:
        UserError: scores that are not finite or not one per detection, or masks of another size
            than the image.
    """
    scores = _scores(instances, "scores", image_id)
    own = _scores(instances, "mask_scores", image_id) if instances.has("mask_scores") else None
    masks = None
    if instances.has("pred_masks"):
        masks = instances.pred_masks
        masks = getattr(masks, "tensor", masks).detach().cpu().numpy()
        if len(masks) and masks.shape[1:] != tuple(instances.image_size):
            raise UserError(
                f"image {image_id!r} has (height, width) {tuple(instances.image_size)}, "
                f"its predicted masks {masks.shape[1:]}"
            )
        masks = _encode(masks)
    return ImageDetections(
        image_id,
        (int(instances.image_size[0]), int(instances.image_size[1])),
        instances.pred_boxes.tensor.detach().cpu().numpy().astype(np.float32).reshape(-1, 4),
        scores,
        instances.pred_classes.detach().cpu().numpy().astype(np.int64),
        masks,
        own,
    )


def to_coco(
    detections: ImageDetections, image_id, category_ids: Sequence[int], text: bool = False
) -> Iterator[dict]:
    """Detections in COCO's results format; `score` is that of the box, and `mask_score` is added
    where masks have scores of their own.

    Args:
        detections: of one image.
        image_id: used in the result.
        category_ids: by contiguous class.
        text: codes as text, which JSON needs, rather than bytes.
    """
    boxes = detections.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    for index, (box, score, label) in enumerate(
        zip(boxes.tolist(), detections.scores.tolist(), detections.classes.tolist())
    ):
        result = {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        if detections.masks is not None:
            counts = detections.masks[index]
            result["segmentation"] = {
                "size": list(detections.size),
                "counts": counts.decode() if text else counts,
            }
        if detections.mask_scores is not None:
            result["mask_score"] = float(detections.mask_scores[index])
        yield result


def write_results(
    detections: Sequence[ImageDetections], category_ids: Sequence[int], path: str
) -> None:
    """Write COCO's results file, image by image."""
    with open(path, "w", encoding="utf-8") as f:
        separator = "["
        for image in detections:
            for result in to_coco(image, image.image_id, category_ids, text=True):
                f.write(separator + json.dumps(result))
                separator = ",\n"
        f.write("]" if separator != "[" else "[]")
