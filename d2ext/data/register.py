"""Registration of COCO-format data sets, by call or by a text `NAME=annotations.json,image_dir`.

The annotation file is read and checked when it is registered, so that a mistake is reported in one
line before any model is built, and the class names are known at once.
"""

import codecs
import contextlib
import logging
import os
import shutil
import tempfile
from typing import NamedTuple

from d2ext.data.catalog import is_registered_as, semantic_map_path
from d2ext.data.check.coco_file import coco_summary
from d2ext.data.check.problems import Report
from d2ext.data.remote import local_path
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

logger = logging.getLogger(__name__)


class RegisterSpec(NamedTuple):
    """One data set of the command line; the fields are the arguments of `register_coco_dataset`."""

    name: str
    json_file: str
    image_root: str
    sem_seg_root: str | None = None


def parse_register(text: str) -> RegisterSpec:
    """Parse `NAME=annotations.json,image_dir` with an optional third part `,semantic_dir`.

    Raises:
        UserError: the text has another form.
    """
    name, _, paths = text.partition("=")
    parts = [part.strip() for part in paths.split(",")]
    if not name.strip() or len(parts) not in (2, 3) or not all(parts):
        raise UserError(
            f"cannot read data set {text!r}; write NAME=annotations.json,image_dir[,semantic_dir]"
        )
    return RegisterSpec(name.strip(), *parts)


def load_coco_records(name, json_file, image_root, sem_seg_root=None):
    """detectron2's COCO records of a data set, with annotation ids and semantic map names.

    Args:
        name: registered name; `load_coco_json` fills its class metadata.
        json_file, image_root: COCO instances file and image folder.
        sem_seg_root: folder of PNG maps named by the stem of the image, or None.

    Returns:
        every annotation has `id`; with `sem_seg_root` a record has `sem_seg_file_name`.
    """
    if not os.path.isfile(json_file):
        raise UserError(
            f"data set {name!r}: {json_file} does not exist; "
            "put it there or set DETECTRON2_DATASETS"
        )
    with _without_mark(json_file) as path:
        records = load_coco_json(path, image_root, name, extra_annotation_keys=["id"])
    for record in records if sem_seg_root else []:
        record["sem_seg_file_name"] = semantic_map_path(sem_seg_root, record["file_name"])
    return records


@contextlib.contextmanager
def _without_mark(json_file):
    """Path of the file, or of a copy without the byte order mark that pycocotools does not read."""
    with open(json_file, "rb") as f:
        marked = f.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        if not marked:
            yield json_file
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, os.path.basename(json_file))
            with open(path, "wb") as copy:
                shutil.copyfileobj(f, copy)
            yield path


def _load_checked_records(name, **paths):
    """Records of a file that may have changed since it was registered."""
    if os.path.isfile(paths["json_file"]):
        check_coco_file(paths["json_file"])
    return load_coco_records(name, **paths)


def check_coco_file(json_file: str) -> list[dict]:
    """Refuse a COCO instances file that would be read wrongly; its images are not looked at.

    Returns:
        its categories.

    Raises:
        UserError: the first thing wrong with it. If there are several, they are logged as a table.
    """
    summary = coco_summary(json_file)
    report = Report("annotation file", json_file)
    report.add(summary.problems, evaluated=False)
    if len(report.of("error")) > 1:
        logger.error("%s", report.table())
    report.raise_errors()
    return summary.categories


def _check_folders(json_file, image_root, sem_seg_root):
    for folder, what in ((image_root, "image"), (sem_seg_root, "semantic map")):
        if folder and not os.path.isdir(folder):
            raise UserError(f"{what} folder {folder} does not exist")
    images = coco_summary(json_file).images
    if images:
        first = os.path.join(image_root, images[0][0])
        if not os.path.isfile(first):
            raise UserError(f"image {first}, the first of {json_file}, does not exist")


def register_coco_dataset(
    name: str,
    json_file: str,
    image_root: str,
    sem_seg_root: str | None = None,
    num_semantic_labels: int | None = None,
) -> None:
    """Check and register a COCO-format data set; doing it twice with the same paths is harmless.

    Args:
        name: new data set name.
        json_file: COCO instances file. Classes are numbered by ascending category id. As the
            folders, it may be an address such as `s3://bucket/train.json`, see `local_path`.
        image_root: folder that the `file_name` entries refer to.
        sem_seg_root: folder of 8-bit greyscale PNG label maps, named by the stem of the image.
        num_semantic_labels: number of labels of these maps; without it they are all read once
            when the number is first needed.

    Raises:
        UserError: see `check_coco_file`; also when the name is taken.
    """
    json_file, image_root = local_path(json_file), local_path(image_root)
    paths = {"json_file": json_file, "image_root": image_root}
    if sem_seg_root:
        sem_seg_root = paths["sem_seg_root"] = local_path(sem_seg_root)
    if name in DatasetCatalog.list():
        if is_registered_as(name, **paths):
            return
        known = MetadataCatalog.get(name).get("json_file", "other data")
        raise UserError(f"data set name {name!r} is already taken by {known}; choose another name")
    categories = sorted(check_coco_file(json_file), key=lambda c: c["id"])
    _check_folders(json_file, image_root, sem_seg_root)
    DatasetCatalog.register(name, lambda: _load_checked_records(name, **paths))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        thing_classes=[c["name"] for c in categories],
        ignore_label=255,
        evaluator_type="coco",
        **paths,
    )
    if num_semantic_labels is not None:
        metadata.set(num_semantic_labels=num_semantic_labels)
