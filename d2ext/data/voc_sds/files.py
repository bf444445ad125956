"""The files of VOC SDS as they were released: where they lie, and the instances of one image.

Two releases are known, with the same `.mat` files. MNC's is `VOCdevkitSDS/` with `img/`, `inst/`,
`cls/`, `train.txt` and `val.txt`. FCIS's is `VOCdevkit/VOCSDS/` with the lists in `ImageSets/Main/`
and the images in `img/` or `JPEGImages/`. SBD's own archive (`benchmark_RELEASE/dataset/`) has the
same annotations, but lists of another split, which are refused.
"""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from d2ext.errors import UserError

FOLDERS = ("VOCdevkitSDS", "VOCdevkit/VOCSDS", "VOCSDS", "benchmark_RELEASE/dataset")
LISTS = ("ImageSets/Main/{}.txt", "{}.txt")
IMAGES = ("JPEGImages", "img")
IGNORED = 255  # label of no instance and no class
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Images of the released lists: SBD outside and inside of VOC 2012 val. Not the lists of SBD itself.
SPLITS = {"train": 5623, "val": 5732}
SBD_SPLITS = {"train": 8498, "val": 2857}


class ImageInstances(NamedTuple):
    """What the two `.mat` files of an image say, with the image they belong to."""

    file_name: str  # path of the image
    labels: np.ndarray  # (H, W), instance number per pixel, 0 = none
    ids: list[int]  # instance numbers, ascending
    classes: list[int]  # class of each, 1..20


def find_folder(root: str) -> str:
    """The folder of the released files inside the data set folder `root`.

    Raises:
        UserError: there is none; the text names the places looked at.
    """
    for folder in FOLDERS:
        path = os.path.join(root, *folder.split("/"))
        if os.path.isdir(os.path.join(path, "inst")):
            return path
    raise UserError(
        f"VOC SDS is not in {os.path.abspath(root)}: none of {', '.join(FOLDERS)} has a folder "
        "'inst'; put it there or set DETECTRON2_DATASETS"
    )


def list_file(folder: str, split: str) -> str | None:
    """The file with the image names of a split, None if there is none."""
    paths = [os.path.join(folder, *name.format(split).split("/")) for name in LISTS]
    return next((path for path in paths if os.path.isfile(path)), None)


def read_list(folder: str, split: str) -> list[str]:
    """Image names of a split (`"train"` or `"val"`), in the order of the list.

    Raises:
        UserError: no list, an empty one, a name given twice, or the list of SBD's own split.
    """
    path = list_file(folder, split)
    if path is None:
        names = " or ".join(name.format(split) for name in LISTS)
        raise UserError(f"VOC SDS in {folder} has no image list {names}")
    try:
        with open(path, encoding="ascii") as f:
            names = [line.split()[0] for line in f if line.strip()]
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is no list of image names: {e.reason} at byte {e.start}") from None
    if not names:
        raise UserError(f"{path} is empty; one image name per line is needed")
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(f"{path} has {name} twice")
        seen.add(name)
    if len(names) == SBD_SPLITS[split]:
        raise UserError(
            f"{path} has {len(names)} images: that is the split of SBD itself, whose training part "
            "contains images of VOC 2012 val; tools/voc_sds.py makes the SDS lists"
        )
    return names


def image_file(folder: str, name: str) -> str | None:
    """Path of an image, None if it is missing."""
    paths = [os.path.join(folder, images, f"{name}.jpg") for images in IMAGES]
    return next((path for path in paths if os.path.isfile(path)), None)


def mat_file(folder: str, kind: str, name: str) -> str:
    """Path of the `.mat` file of an image; `kind` is `"inst"` or `"cls"`."""
    return os.path.join(folder, kind, f"{name}.mat")


def _read_struct(path: str, struct: str) -> np.ndarray:
    """The fields of a one-element MATLAB struct."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    import scipy.io  # here, because importing it takes a while and few programs read these files

    try:
        content = scipy.io.loadmat(path, variable_names=[struct])
    except Exception as e:  # scipy raises whatever a broken file leads to
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path} is no readable MATLAB 5 file: {reason}") from e
    value = content.get(struct)
    if value is None or value.dtype.names is None or value.size != 1:
        raise UserError(f"{path} has no struct {struct}")
    return value.reshape(-1)[0]


def _labels(path: str, struct: str, fields) -> np.ndarray:
    """Field `Segmentation` as (H, W) integers."""
    if "Segmentation" not in fields.dtype.names:
        raise UserError(f"{path} has no field {struct}.Segmentation")
    labels = fields["Segmentation"]
    if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "ui":
        shape = f"{getattr(labels, 'shape', '?')} {getattr(labels, 'dtype', '')}".strip()
        raise UserError(f"{path}: {struct}.Segmentation is {shape}, not a matrix of integers")
    return labels


def _categories(path: str, fields) -> np.ndarray | None:
    """Field `Categories` as (N,) integers; old conversions lack it."""
    if "Categories" not in fields.dtype.names:
        return None
    values = np.asarray(fields["Categories"]).reshape(-1)
    if values.dtype.kind not in "uif" or (values != values.round()).any():
        raise UserError(f"{path}: GTinst.Categories is not a list of integers")
    return values.astype(np.int64)


def _image_size(path: str):
    """(height, width) from the header of an image."""
    try:
        with Image.open(path) as image:
            return image.size[::-1]
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"cannot read image {path}: {' '.join(str(e).split())}") from e


def _class_of(inst_path, cls_path, number, classes, categories):
    """The one class of an instance, from the class labels under it."""
    found = np.unique(classes).tolist()
    if len(found) != 1:
        raise UserError(f"{cls_path}: instance {number} of {inst_path} covers classes {found}")
    if not 1 <= found[0] <= len(CLASSES):
        raise UserError(
            f"{cls_path}: instance {number} has class {found[0]}, not 1..{len(CLASSES)}"
        )
    if categories is not None:
        if number > len(categories):
            raise UserError(f"{inst_path}: GTinst.Categories has no entry for instance {number}")
        if categories[number - 1] != found[0]:
            raise UserError(
                f"{inst_path}: GTinst.Categories says class {categories[number - 1]} for instance "
                f"{number}, {cls_path} class {found[0]}"
            )
    return found[0]


def read_instances(folder: str, name: str) -> ImageInstances:
    """Read the annotation of one image; of the image itself only the size.

    An instance is a label of `GTinst.Segmentation` other than 0 and 255. Its class is the one
    label of `GTcls.Segmentation` below it, which has to be that of `GTinst.Categories`.

    Args:
        folder: of the released files, see `find_folder`.
        name: of the image, e.g. `"2008_000008"`.

    Raises:
        UserError: one line naming the file that is missing, broken or contradicts another one.
    """
    inst_path, cls_path = mat_file(folder, "inst", name), mat_file(folder, "cls", name)
    fields = _read_struct(inst_path, "GTinst")
    labels = _labels(inst_path, "GTinst", fields)
    categories = _categories(inst_path, fields)
    classes = _labels(cls_path, "GTcls", _read_struct(cls_path, "GTcls"))
    if classes.shape != labels.shape:
        raise UserError(f"{cls_path} is {_size(classes)}, {inst_path} {_size(labels)}")
    path = image_file(folder, name)
    if path is None:
        raise UserError(f"image {os.path.join(folder, IMAGES[-1], name)}.jpg does not exist")
    if _image_size(path) != labels.shape:
        height, width = _image_size(path)
        raise UserError(f"{inst_path} is {_size(labels)}, its image {path} {width}x{height}")
    ids = [int(i) for i in np.unique(labels) if i not in (0, IGNORED)]
    if ids and ids[0] < 0:
        raise UserError(f"{inst_path}: GTinst.Segmentation has the negative label {ids[0]}")
    found = [_class_of(inst_path, cls_path, i, classes[labels == i], categories) for i in ids]
    return ImageInstances(path, labels, ids, found)


def _size(labels):
    return f"{labels.shape[1]}x{labels.shape[0]}"
