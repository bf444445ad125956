"""Semantic ground truth derived from instance masks, and the number of labels a data set has."""

import glob
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from d2ext.data.catalog import check_registered, dataset_classes
from d2ext.data.cropped_masks import CroppedMasks
from d2ext.errors import UserError

from detectron2.data import MetadataCatalog

IGNORE_LABEL = 255
SEMANTIC_MODES = ("auto", "none", "dataset", "instances")


def check_semantic_mode(mode: str) -> None:
    """Raise `UserError` unless `mode` is one of `SEMANTIC_MODES`."""
    if mode not in SEMANTIC_MODES:
        raise UserError(
            f"unknown semantic mode {mode!r}; use one of {', '.join(SEMANTIC_MODES)} "
            "(INPUT.SEMANTIC / dataloader.train.mapper.semantic)"
        )


def semantic_from_instances(
    masks: torch.Tensor,
    classes: torch.Tensor,
    height: int,
    width: int,
    num_classes: int,
    ignore: torch.Tensor | None = None,
) -> torch.Tensor:
    """Label every pixel with the class of the instance that covers it.

    Where instances overlap, the smaller one wins: it would vanish under the larger one otherwise.

    Args:
        masks: bool (N, height, width).
        classes: int (N,), values in [0, num_classes).
        height, width: image size in pixels.
        num_classes: K; also the label of pixels that no instance covers, so a semantic head needs
            K + 1 outputs.
        ignore: bool (height, width) region labelled 255 (crowds), or None. It wins over background
            only: an annotated instance in front of a crowd keeps its class.

    Returns:
        uint8 (height, width).

    Raises:
        UserError: more than 254 classes, so that a label would be 255.
    """
    crops = [m.bool().cpu().numpy().view(np.uint8) for m in masks]
    cropped = CroppedMasks.around((height, width), crops)
    crowd = None if ignore is None else ignore.bool().cpu().numpy().view(np.uint8)
    crowds = None if crowd is None else CroppedMasks.around((height, width), [crowd])
    return semantic_from_crops(cropped, classes.cpu().numpy(), num_classes, crowds)


def semantic_from_crops(
    masks: CroppedMasks, classes: np.ndarray, num_classes: int, ignore: CroppedMasks | None = None
) -> torch.Tensor:
    """`semantic_from_instances` of masks that are known inside their boxes.

    Args:
        masks: N masks.
        classes: int (N,), values in [0, num_classes).
        num_classes: K.
        ignore: masks of the regions labelled 255, or None.

    Returns:
        uint8 (height, width).

    Raises:
        UserError: more than 254 classes, so that a label would be 255.
    """
    if num_classes >= IGNORE_LABEL:
        raise UserError(
            f"semantic labels cannot be made of instances of {num_classes} classes: 255 stands for "
            "pixels without label; take the data set's maps, or none (INPUT.SEMANTIC, "
            "MODEL.HTC.SEMANTIC.ENABLED)"
        )
    labels = np.full(masks.image_size, num_classes, np.uint8)
    if ignore is not None:
        ignore.paint(labels, [IGNORE_LABEL] * len(ignore))
    order = np.argsort(-masks.areas, kind="stable")
    masks[order].paint(labels, classes[order].tolist())
    return torch.from_numpy(labels)


def _labels_of_maps(name, folder):
    """Largest label of all PNG maps in a folder, plus one."""
    files = sorted(glob.glob(os.path.join(folder, "*.png")))
    largest = -1
    for path in files:
        labels = np.unique(np.asarray(Image.open(path)))
        largest = max([largest, *labels[labels != IGNORE_LABEL].tolist()])
    if largest < 0:
        raise UserError(f"data set {name!r}: no labelled semantic map (*.png) in {folder}")
    return largest + 1


def _num_labels_of_one(name, mode):
    metadata = MetadataCatalog.get(name)
    if mode == "instances" or (mode == "auto" and not metadata.get("sem_seg_root")):
        return len(dataset_classes(name)) + 1
    if metadata.get("num_semantic_labels"):
        return metadata.num_semantic_labels
    if metadata.get("stuff_classes"):
        return len(metadata.stuff_classes)
    if not metadata.get("sem_seg_root"):
        raise UserError(
            f"data set {name!r} has no semantic maps; use semantic mode 'auto' or 'instances'"
        )
    metadata.num_semantic_labels = _labels_of_maps(name, metadata.sem_seg_root)
    return metadata.num_semantic_labels


def semantic_num_labels(names: str | Sequence[str], mode: str) -> int:
    """Number of semantic labels S that the mapper produces for these data sets.

    Args:
        names: one or several registered data sets.
        mode: the `semantic` option of `InstanceSegMapper`.

    Returns:
        0 for mode "none"; the number of labels of the data set's own maps; or K + 1 where the
        labels come from the instances.

    Raises:
        UserError: unknown name, the data sets disagree, or mode "dataset" and one has no maps.
    """
    check_semantic_mode(mode)
    names = check_registered(names)
    if mode == "none":
        return 0
    counts = {name: _num_labels_of_one(name, mode) for name in names}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UserError(f"data sets have different numbers of semantic labels ({text})")
    return counts[names[0]]
