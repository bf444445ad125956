"""What is drawn: predictions, ground truth, training images, and the stages of a cascade."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from d2ext.errors import UserError
from d2ext.modeling.regions.targets import gt_bitmaps
from d2ext.visualization.overlay import class_labels, instance_colors, overlay, resized
from d2ext.visualization.panels import side_by_side

from detectron2.data import Metadata
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer


def draw_predictions(
    rgb: np.ndarray,
    instances: Instances,
    metadata,
    threshold: float = 0.5,
    scale: float | None = None,
) -> np.ndarray:
    """Masks, boxes, class names and scores over an image.

    Args:
        rgb: uint8 (H, W, 3).
        instances: of a detector, in pixels of the image: `pred_boxes`, `pred_classes`,
            `scores` and, optionally, bool `pred_masks` (N, H, W).
        metadata: detectron2 `Metadata` with `thing_classes` (and, optionally,
            `thing_colors`).
        threshold: lowest score that is drawn.
        scale: enlargement; default: as much as a small image needs to be readable.

    Returns:
        uint8 RGB, `scale` times as large.

    Raises:
        UserError: a class without a name, or instances of another image size.
    """
    _check_size(rgb, tuple(instances.image_size), "the predictions")
    kept = instances.scores >= threshold
    classes = instances.pred_classes[kept].tolist()
    masks = None
    if instances.has("pred_masks"):  # one by one: those of a photograph fill hundreds of MB
        masks = [
            instances.pred_masks[i].cpu().numpy().astype(bool, copy=False)
            for i in kept.nonzero()[:, 0]
        ]
    return overlay(
        rgb,
        instances.pred_boxes.tensor[kept].cpu().numpy(),
        masks,
        class_labels(classes, metadata, instances.scores[kept].tolist()),
        instance_colors(classes, _thing_colors(metadata)),
        scale,
    )


def draw_ground_truth(
    record: dict[str, Any],
    metadata,
    rgb: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Annotated masks, boxes and class names over an image.

    Args:
        record: a detectron2 data set record: `annotations` and `file_name`.
        metadata: as for `draw_predictions`.
        rgb: the image, uint8 (H, W, 3); default: read from `file_name`.
        scale: as for `draw_predictions`.

    Returns:
        uint8 RGB, `scale` times as large. Crowd regions are labelled `name (crowd)`.

    Raises:
        UserError: unreadable image, image of another size than the record says, a class without
            a name.
    """
    if rgb is None:
        try:
            rgb = read_image(record["file_name"], "RGB")
        except OSError as error:
            raise UserError(f"cannot read image {record['file_name']}: {error}") from error
    height, width = rgb.shape[:2]
    _check_size(rgb, (record.get("height", height), record.get("width", width)), "the record")
    annotations = record.get("annotations") or []
    classes = [a["category_id"] for a in annotations]
    crowd = [" (crowd)" if a.get("iscrowd", 0) else "" for a in annotations]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = None
    if annotations and all(a.get("segmentation") for a in annotations):
        instances = annotations_to_instances(annotations, (height, width), mask_format="bitmask")
        masks = instances.gt_masks.tensor.numpy()
    return overlay(
        rgb,
        np.asarray(boxes),
        masks,
        [name + mark for name, mark in zip(class_labels(classes, metadata), crowd)],
        instance_colors(classes, _thing_colors(metadata)),
        scale,
    )


def draw_training_input(
    sample: dict[str, Any], metadata, image_format: str = "BGR", scale: float | None = None
) -> np.ndarray:
    """Masks, boxes and class names over an image as a training loader gives it.

    Args:
        sample: `image`, uint8 (3, H, W), and `instances` with `gt_boxes`, `gt_classes` and,
            optionally, `gt_masks` of either kind, on the CPU.
        metadata: as for `draw_predictions`.
        image_format: order of the channels, "BGR" or "RGB".
        scale: as for `draw_predictions`.

    Returns:
        uint8 RGB, `scale` times as large.
    """
    instances = sample["instances"]
    classes = instances.gt_classes.tolist()
    return overlay(
        training_image(sample, image_format),
        instances.gt_boxes.tensor.numpy(),
        gt_bitmaps(instances).numpy() if instances.has("gt_masks") else None,
        class_labels(classes, metadata),
        instance_colors(classes, _thing_colors(metadata)),
        scale,
    )


def training_image(sample: dict[str, Any], image_format: str = "BGR") -> np.ndarray:
    """The image of a training loader as uint8 RGB (H, W, 3); arguments as above."""
    pixels = sample["image"].numpy().transpose(1, 2, 0)
    return np.ascontiguousarray(pixels[:, :, ::-1] if image_format == "BGR" else pixels)


def draw_semantic(
    rgb: np.ndarray, labels: np.ndarray, names: Sequence[str], scale: float | None = None
) -> np.ndarray:
    """A semantic map over an image, each label in the colour that a class of its number has.

    Args:
        rgb: uint8 (H, W, 3).
        labels: int (H, W); those without a name, such as 255, are not drawn.
        names: of labels 0, 1, ...
        scale: as for `draw_predictions`.

    Returns:
        uint8 RGB, `scale` times as large.
    """
    canvas = resized(rgb, scale)
    height, width = canvas.shape[:2]
    labels = cv2.resize(labels.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST)
    colors = [[round(255 * x) for x in instance_colors([i])[0]] for i in range(len(names))]
    metadata = Metadata(stuff_classes=list(names), stuff_colors=colors)
    visualizer = Visualizer(canvas, metadata)
    return visualizer.draw_sem_seg(labels, area_threshold=0, alpha=0.7).get_image()


def draw_stages(
    rgb: np.ndarray,
    per_stage_instances: Sequence[Instances],
    metadata,
    threshold: float = 0.5,
    scale: float | None = None,
) -> np.ndarray:
    """One panel per stage of a cascade, in a row, each as `draw_predictions` draws it.

    Args:
        per_stage_instances: the results after the first, second, ... stage, for example the
            `"instances"` of `model.inference_stages([inputs])`.
    """
    panels: list[np.ndarray] = []
    titles: list[str] = []
    for number, instances in enumerate(per_stage_instances, start=1):
        panels.append(draw_predictions(rgb, instances, metadata, threshold, scale))
        found = int((instances.scores >= threshold).sum())
        titles.append(f"after stage {number}: {found} object{'' if found == 1 else 's'}")
    return side_by_side(panels, titles)


def _thing_colors(metadata):
    return metadata.get("thing_colors") if metadata is not None else None


def _check_size(rgb: np.ndarray, size: tuple[int, int], what: str) -> None:
    if rgb.shape[:2] != tuple(size):
        raise UserError(f"the image is {rgb.shape[:2]} (height, width), {what} {tuple(size)}")
