"""A miniature VOC SDS folder of drawn images with real `.mat` files, in either released layout: to
try a pipeline before the 1.5 GB of images are there, and for tests."""

import os
from collections.abc import Sequence

import numpy as np
import scipy.io
import scipy.sparse
from PIL import Image

from d2ext.data.voc_sds.files import CLASSES

LAYOUTS = {"mnc": "VOCdevkitSDS", "fcis": "VOCdevkit/VOCSDS"}


def _cell(values) -> np.ndarray:
    """A MATLAB column of cells."""
    cell = np.empty((len(values), 1), dtype=object)
    for row, value in enumerate(values):
        cell[row, 0] = value
    return cell


def _boundary(mask):
    """Sparse map of the pixels of a mask that have a neighbour outside of it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return scipy.sparse.csc_matrix((mask & ~inner).astype(float))


def write_annotation(folder: str, name: str, labels: np.ndarray, classes: Sequence[int]) -> None:
    """Write the two `.mat` files of an image as SBD has them.

    Args:
        folder: of the released files, with `inst/` and `cls/`.
        name: of the image.
        labels: (H, W) uint8, instance number per pixel, 0 = none.
        classes: class (1..20) of instance 1, 2, ...
    """
    semantic = np.concatenate([[0], np.asarray(classes, np.uint8)]).astype(np.uint8)[labels]
    instances = range(1, len(classes) + 1)
    content = {
        "GTinst": {
            "Segmentation": labels,
            "Boundaries": _cell([_boundary(labels == i) for i in instances]),
            "Categories": np.asarray(classes, np.float64).reshape(-1, 1),
        },
        "GTcls": {
            "Segmentation": semantic,
            "Boundaries": _cell([_boundary(semantic == c) for c in range(1, len(CLASSES) + 1)]),
            "CategoriesPresent": np.unique(np.asarray(classes, np.float64)).reshape(-1, 1),
        },
    }
    for kind, struct in (("inst", "GTinst"), ("cls", "GTcls")):
        path = os.path.join(folder, kind, f"{name}.mat")
        scipy.io.savemat(path, {struct: content[struct]}, do_compression=True)


def _draw(rng, classes, size):
    """(image uint8 (H, W, 3), labels uint8 (H, W), class per instance) with discs and boxes."""
    height, width = size
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    labels = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    chosen = []
    columns = int(rng.integers(1, 3))
    for column in range(columns):  # side by side, so that none hides another
        category = int(rng.choice(classes))
        cell = width / columns
        cx, cy = cell * (column + rng.uniform(0.4, 0.6)), height * rng.uniform(0.4, 0.6)
        rx, ry = cell * rng.uniform(0.25, 0.38), height * rng.uniform(0.25, 0.38)
        u, v = (x - cx) / rx, (y - cy) / ry
        mask = u**2 + v**2 < 1 if category % 2 else np.maximum(abs(u), abs(v)) < 0.9
        chosen.append(category)
        labels[mask] = len(chosen)
        colour = np.random.default_rng(category).integers(90, 255, 3)
        image[mask] = colour + rng.integers(-20, 1, (int(mask.sum()), 3))
    return image, labels, chosen


def make_example(
    root: str,
    *,
    layout: str = "mnc",
    num_images: tuple[int, int] = (6, 4),
    classes: Sequence[int] = (1, 7, 15),
    size: tuple[int, int] = (72, 96),
    seed: int = 0,
) -> dict[str, list[str]]:
    """Write images, annotations and lists below a data set folder.

    Args:
        root: folder of all data sets.
        layout: a key of `LAYOUTS`.
        num_images: of the training and the validation part.
        classes: VOC classes (1..20) that occur.
        size: (height, width) of the images.
        seed: of the drawing.

    Returns:
        Image names by split.
    """
    folder = os.path.join(root, *LAYOUTS[layout].split("/"))
    images = os.path.join(folder, "img" if layout == "mnc" else "JPEGImages")
    lists = folder if layout == "mnc" else os.path.join(folder, "ImageSets", "Main")
    for path in (images, lists, os.path.join(folder, "inst"), os.path.join(folder, "cls")):
        os.makedirs(path, exist_ok=True)
    rng = np.random.default_rng(seed)
    names, number = {}, 0
    for split, count in zip(("train", "val"), num_images):
        names[split] = [f"2008_{number + i:06d}" for i in range(1, count + 1)]
        number += count
        for name in names[split]:
            image, labels, chosen = _draw(rng, classes, size)
            Image.fromarray(image).save(os.path.join(images, f"{name}.jpg"), quality=95)
            write_annotation(folder, name, labels, chosen)
        with open(os.path.join(lists, f"{split}.txt"), "w", encoding="ascii") as f:
            f.write("".join(f"{name}\n" for name in names[split]))
    return names
