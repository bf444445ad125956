"""What is asked of the data sets that are registered, and where data sets lie."""

import collections
import difflib
import os
from collections.abc import Sequence

from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog

_SHOWN = 8  # classes in one line


def datasets_root():
    """Folder of all data sets: $DETECTRON2_DATASETS, or `datasets` as in detectron2."""
    return os.environ.get("DETECTRON2_DATASETS") or "datasets"


def semantic_map_path(sem_seg_root: str, file_name: str) -> str:
    """The PNG map of an image: it is named by the stem of the image."""
    stem = os.path.splitext(os.path.basename(file_name))[0]
    return os.path.join(sem_seg_root, stem + ".png")


def is_registered_as(name, json_file, image_root, sem_seg_root=None) -> bool:
    """Whether a name is registered, and for exactly these paths (compared as absolute paths)."""
    if name not in DatasetCatalog.list():
        return False
    metadata = MetadataCatalog.get(name)
    wanted = {"json_file": json_file, "image_root": image_root, "sem_seg_root": sem_seg_root}

    def absolute(path):
        return os.path.abspath(path) if path else None

    return all(absolute(metadata.get(k)) == absolute(v) for k, v in wanted.items())


def check_registered(names: str | Sequence[str]) -> list[str]:
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


def dataset_classes(names: str | Sequence[str]) -> list[str]:
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


def describe_records(records: Sequence[dict], classes: Sequence[str] = ()) -> str:
    """Numbers of images and of instances of every class (but crowds) of detectron2's records, in
    one line, the largest classes first."""
    found = collections.Counter(
        a.get("category_id")
        for record in records
        for a in record.get("annotations", ())
        if not a.get("iscrowd", 0)
    )
    text = f"{len(records)} images, {found.total()} instances"
    if not found:
        return text
    names = dict(enumerate(classes))
    parts = [f"{names.get(i, f'class {i}')} {n}" for i, n in found.most_common(_SHOWN)]
    if len(found) > _SHOWN:
        parts.append(f"{found.total() - sum(n for _, n in found.most_common(_SHOWN))} of others")
    absent = [name for i, name in names.items() if i not in found]
    if absent:
        parts.append(f"none of {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}")
    return f"{text} ({', '.join(parts)})"


def _difference(first, second):
    for index, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return f"class {index} is {a!r} and {b!r}"
    return f"{len(first)} and {len(second)} classes"
