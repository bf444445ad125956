"""Registration of COCO-format data sets, by call or by a text `NAME=annotations.json,image_dir`.

The annotation file is read and checked when it is registered, so that a mistake is reported in one
line before any model is built, and the class names are known at once.
"""

import difflib
import json
import os
from typing import List, NamedTuple, Optional, Sequence, Union

from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

_REQUIRED_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
}


class RegisterSpec(NamedTuple):
    """One data set of the command line; the fields are the arguments of `register_coco_dataset`."""

    name: str
    json_file: str
    image_root: str
    sem_seg_root: Optional[str] = None


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
        name (str): registered name; `load_coco_json` fills its class metadata.
        json_file, image_root (str): COCO instances file and image folder.
        sem_seg_root (str): folder of PNG maps named by the stem of the image, or None.

    Returns:
        list[dict]: every annotation has `id`; with `sem_seg_root` a record has `sem_seg_file_name`.
    """
    if not os.path.isfile(json_file):
        raise UserError(
            f"data set {name!r}: {json_file} does not exist; "
            "put it there or set DETECTRON2_DATASETS"
        )
    records = load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
    for record in records if sem_seg_root else []:
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        record["sem_seg_file_name"] = os.path.join(sem_seg_root, stem + ".png")
    return records


def _read_json(json_file):
    try:
        with open(json_file, encoding="utf-8") as f:
            return json.load(f)
    except json.JSONDecodeError as e:
        raise UserError(
            f"{json_file} is not valid JSON: {e.msg} at line {e.lineno} column {e.colno}"
        ) from None
    except UnicodeDecodeError as e:
        raise UserError(f"{json_file} is not UTF-8 text: {e.reason} at byte {e.start}") from None


def _check_keys(json_file, data):
    if not isinstance(data, dict):
        raise UserError(f"{json_file} is not a COCO instances file: its top level is no object")
    for section, keys in _REQUIRED_KEYS.items():
        if not isinstance(data.get(section), list):
            raise UserError(f"{json_file} has no list {section!r}; a COCO instances file needs it")
        for index, entry in enumerate(data[section]):
            lost = [k for k in keys if not isinstance(entry, dict) or k not in entry]
            if lost:
                raise UserError(f"{json_file}: {section}[{index}] has no {lost[0]!r}")


def _check_unique(json_file, section, key, values):
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{json_file}: {section} has {key} {value!r} twice")
        seen.add(value)
    return seen


def check_coco_file(json_file: str, image_root: str) -> dict:
    """Read a COCO instances file and check what detectron2 would trip over later.

    Returns:
        dict: the content of the file.

    Raises:
        UserError: file, image folder or first image missing; bad JSON, missing or doubled
            entries, references to unknown ids.
    """
    if not os.path.isfile(json_file):
        raise UserError(f"annotation file {json_file} does not exist")
    if not os.path.isdir(image_root):
        raise UserError(f"image folder {image_root} does not exist")
    data = _read_json(json_file)
    _check_keys(json_file, data)
    if not data["categories"]:
        raise UserError(f"{json_file} has no categories; at least one is needed")
    if not data["images"]:
        raise UserError(f"{json_file} has no images; at least one is needed")
    categories = _check_unique(json_file, "categories", "id", [c["id"] for c in data["categories"]])
    _check_unique(json_file, "categories", "name", [c["name"] for c in data["categories"]])
    images = _check_unique(json_file, "images", "id", [i["id"] for i in data["images"]])
    _check_unique(json_file, "annotations", "id", [a["id"] for a in data["annotations"]])
    for annotation in data["annotations"]:
        where = f"{json_file}: annotation {annotation['id']}"
        if annotation["image_id"] not in images:
            raise UserError(f"{where} has unknown image_id {annotation['image_id']!r}")
        if annotation["category_id"] not in categories:
            raise UserError(f"{where} has unknown category_id {annotation['category_id']!r}")
        if not isinstance(annotation["bbox"], list) or len(annotation["bbox"]) != 4:
            raise UserError(f"{where} has a bbox that is not [x, y, width, height]")
        if annotation.get("ignore", 0):
            raise UserError(f"{where} has 'ignore'; detectron2 knows only 'iscrowd'")
    first = os.path.join(image_root, data["images"][0]["file_name"])
    if not os.path.isfile(first):
        raise UserError(f"image {first}, the first of {json_file}, does not exist")
    return data


def register_coco_dataset(
    name: str,
    json_file: str,
    image_root: str,
    sem_seg_root: Optional[str] = None,
    num_semantic_labels: Optional[int] = None,
) -> None:
    """Check and register a COCO-format data set; doing it twice with the same paths is harmless.

    Args:
        name: new data set name.
        json_file: COCO instances file. Classes are numbered by ascending category id.
        image_root: folder that the `file_name` entries refer to.
        sem_seg_root: folder of 8-bit greyscale PNG label maps, named by the stem of the image.
        num_semantic_labels: number of labels of these maps; without it they are all read once
            when the number is first needed.

    Raises:
        UserError: see `check_coco_file`; also when the name is taken.
    """
    paths = {"json_file": json_file, "image_root": image_root}
    if sem_seg_root:
        paths["sem_seg_root"] = sem_seg_root
    if name in DatasetCatalog.list():
        if is_registered_as(name, **paths):
            return
        known = MetadataCatalog.get(name).get("json_file", "other data")
        raise UserError(f"data set name {name!r} is already taken by {known}; choose another name")
    data = check_coco_file(json_file, image_root)
    if sem_seg_root and not os.path.isdir(sem_seg_root):
        raise UserError(f"semantic map folder {sem_seg_root} does not exist")
    categories = sorted(data["categories"], key=lambda c: c["id"])
    DatasetCatalog.register(name, lambda: load_coco_records(name, **paths))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        thing_classes=[c["name"] for c in categories],
        ignore_label=255,
        evaluator_type="coco",
        **paths,
    )
    if num_semantic_labels is not None:
        metadata.set(num_semantic_labels=num_semantic_labels)


def is_registered_as(name, json_file, image_root, sem_seg_root=None) -> bool:
    """Whether a name is registered, and for exactly these paths (compared as absolute paths)."""
    if name not in DatasetCatalog.list():
        return False
    metadata = MetadataCatalog.get(name)
    wanted = {"json_file": json_file, "image_root": image_root, "sem_seg_root": sem_seg_root}

    def absolute(path):
        return os.path.abspath(path) if path else None

    return all(absolute(metadata.get(k)) == absolute(v) for k, v in wanted.items())


def check_registered(names: Union[str, Sequence[str]]) -> List[str]:
    """Names as a list, all of them registered.

    Raises:
        UserError: no name, or an unknown one; the text has the nearest known names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no data set given; name at least one")
    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "register it first"
            raise UserError(f"unknown data set {name!r}; {hint}")
    return names


def dataset_classes(names: Union[str, Sequence[str]]) -> List[str]:
    """Class names shared by one or several registered data sets.

    Raises:
        UserError: an unknown name, a set without class names, or two sets that disagree.
    """
    names = check_registered(names)
    classes = []
    for name in names:
        current = MetadataCatalog.get(name).get("thing_classes")
        if not current:
            raise UserError(f"data set {name!r} has no class names in its metadata")
        classes.append(list(current))
        if classes[-1] != classes[0]:
            raise UserError(
                f"data sets {names[0]!r} and {name!r} have different classes "
                f"({_difference(classes[0], classes[-1])}); they cannot be used together"
            )
    return classes[0]


def _difference(first, second):
    for index, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return f"class {index} is {a!r} and {b!r}"
    return f"{len(first)} and {len(second)} classes"
