"""Check of a COCO instances file: its structure, and every image and annotation entry.

Image files are not looked at here. COCO's 860,000 annotations take a while, so that the result is
kept on disk when it took long.
"""

import gc
import json
import math
import os
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from d2ext.data.check import cache
from d2ext.data.check.boxes import disagreement_finding, disagreements, systematic_findings
from d2ext.data.check.cache import fingerprint
from d2ext.data.check.masks import check_masks
from d2ext.data.check.problems import Finding, Problem
from d2ext.data.check.repeats import area_findings, copies, file_repeats
from d2ext.data.convert.guess import conversion_hint
from d2ext.errors import UserError

_REQUIRED_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
}


def read_coco_file(json_file: str, unique_names: bool = True) -> dict:
    """Read a COCO instances file; its sections are lists of objects with the keys they need.

    Args:
        unique_names: whether two categories of one name are an error.

    Raises:
        UserError: file missing, no JSON, or another structure; no category or no image.
    """
    if not os.path.isfile(json_file):
        what = "is a folder, no COCO file" if os.path.isdir(json_file) else "does not exist"
        raise UserError(f"annotation file {json_file} {what}{_hint(json_file)}")
    collecting = gc.isenabled()
    gc.disable()  # halves the time: nothing of the many small objects is garbage
    try:
        with open(json_file, encoding="utf-8-sig") as f:
            data = json.load(f)
    except json.JSONDecodeError as e:
        raise UserError(
            f"{json_file} is not valid JSON: {e.msg} at line {e.lineno} column {e.colno}"
            + _hint(json_file)
        ) from None
    except UnicodeDecodeError as e:
        raise UserError(f"{json_file} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except (OSError, RecursionError) as e:
        raise UserError(f"cannot read {json_file}: {e}") from None
    finally:
        if collecting:
            gc.enable()
    _check_structure(json_file, data, unique_names)
    return data


def _hint(path):
    command = conversion_hint(path)
    return f"; convert it: {command}" if command else ""


def _check_structure(json_file, data, unique_names):
    if not isinstance(data, dict):
        raise UserError(f"{json_file} is not a COCO instances file: its top level is no object")
    for section, keys in _REQUIRED_KEYS.items():
        if not isinstance(data.get(section), list):
            hint = _hint(json_file) or "; a COCO instances file needs it"
            raise UserError(f"{json_file} has no list {section!r}{hint}")
        for index, entry in enumerate(data[section]):
            if not isinstance(entry, dict):
                raise UserError(f"{json_file}: {section}[{index}] is no object")
            for key in keys:
                if key not in entry:
                    raise UserError(f"{json_file}: {section}[{index}] has no {key!r}")
    for section in ("categories", "images"):
        if not data[section]:
            raise UserError(f"{json_file} has no {section}; at least one is needed")
    for key, kind in (("id", int), ("name", str)):
        seen = set()
        for value in (category[key] for category in data["categories"]):
            if type(value) is not kind:
                word = "a whole number" if kind is int else "text"
                raise UserError(f"{json_file}: category {key} {value!r} is not {word}")
            if value in seen and (unique_names or key == "id"):
                raise UserError(f"{json_file}: categories has {key} {value!r} twice")
            seen.add(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _image_finding(image: dict) -> Finding | None:
    name = image["file_name"]
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return Finding("error", "file-name", f"has the file_name {name!r}, which is no name")
    for key in ("width", "height"):
        if type(image[key]) is not int or image[key] <= 0:
            text = f"has {key} {image[key]!r}; it must be a positive whole number"
            return Finding("error", "image-size", text)
    return None


def _box_finding(box: Any, image: dict) -> Finding | None:
    if not isinstance(box, list) or len(box) != 4:
        return Finding("error", "box-form", "has a bbox that is not [x, y, width, height]")
    if not all(map(_is_number, box)):
        return Finding("error", "box-number", f"has the bbox {box}; it must be of finite numbers")
    x, y, width, height = box
    if width < 0 or height < 0:
        text = f"has the bbox {box} of negative size; it must be [x, y, width, height]"
        return Finding("error", "box-negative", text)
    if width == 0 or height == 0:
        return Finding("warning", "box-empty", f"has the bbox {box} of zero area; it is left out")
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        text = f"has the bbox {box} outside the image; it is left out"
        return Finding("warning", "box-outside", text)
    if min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1:
        text = f"has the bbox {box} reaching out of the image; it is cut"
        return Finding("warning", "box-beyond", text)
    return None


def _reference_finding(annotation: dict, images: dict, categories: set) -> Finding | None:
    image, category = annotation["image_id"], annotation["category_id"]
    if not _is_id(image) or image not in images:
        return Finding("error", "unknown-image", f"has unknown image_id {image!r}")
    if not _is_id(category) or category not in categories:
        return Finding("error", "unknown-category", f"has unknown category_id {category!r}")
    if annotation.get("ignore", 0):
        return Finding("error", "ignore", "has 'ignore'; detectron2 knows only 'iscrowd'")
    crowd = annotation.get("iscrowd", 0)
    if type(crowd) not in (int, bool) or crowd not in (0, 1):
        return Finding("error", "iscrowd", f"has iscrowd {crowd!r}; it must be 0 or 1")
    if "area" in annotation and not _is_number(annotation["area"]):
        return Finding("error", "area", f"has area {annotation['area']!r}, which is no number")
    return None


class _EntryCheck:
    """One pass over the entries of a file that `read_coco_file` read."""

    def __init__(self, data: dict):
        self.data = data
        self.images: dict[Any, dict] = {}
        self.broken: set = set()  # ids of images without a usable size
        self.categories = {category["id"] for category in data["categories"]}
        self.found: list[Problem] = []

    def run(self) -> list[Problem]:
        self._check_images()
        sound = self._check_annotations()
        self._check_masks(sound)
        self._check_set()
        return self.found

    def _check_images(self):
        for index, image in enumerate(self.data["images"]):
            own, name = image["id"], image["file_name"]
            finding = _image_finding(image)
            if not _is_id(own):
                finding = Finding("error", "image-id", f"has the id {own!r}, which is none")
            elif own in self.images:
                finding = Finding("error", "image-id", f"has the id {own!r} of another image")
            else:
                self.images[own] = image
                if finding:
                    self.broken.add(own)
            if finding:
                label = name if isinstance(name, str) and name.strip() else f"images[{index}]"
                self.found.append(Problem(*finding, label))

    def _check_annotations(self) -> list[dict]:
        """Annotations whose mask can be checked."""
        seen: set = set()
        sound = []
        for index, annotation in enumerate(
            tqdm(
                self.data["annotations"], "annotations", unit="", delay=2, leave=False, disable=None
            )
        ):
            own = annotation["id"]
            if not _is_id(own):
                finding, own = Finding("error", "annotation-id", f"has the id {own!r}"), f"#{index}"
            elif own in seen:
                finding = Finding("error", "annotation-id", "has the id of another annotation")
            else:
                seen.add(own)
                finding = _reference_finding(annotation, self.images, self.categories)
            if finding is None:
                if annotation["image_id"] not in self.broken:
                    finding = _box_finding(annotation["bbox"], self.images[annotation["image_id"]])
                    if finding is None or finding.severity != "error":
                        sound.append(annotation)
            if finding:
                self._add(finding, annotation["image_id"], own)
        return sound

    def _check_masks(self, annotations: list[dict]):
        images = [self.images[a["image_id"]] for a in annotations]
        masks = [a["segmentation"] for a in annotations]
        sizes = [(image["height"], image["width"]) for image in images]
        findings, shapes = check_masks(masks, sizes)
        boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
        boxes[(boxes[:, 2:] <= 0).any(1)] = np.nan
        odd = dict(findings)
        for index in disagreements(boxes, shapes.extents).tolist():
            box, extent = annotations[index]["bbox"], shapes.extents[index]
            odd.setdefault(index, disagreement_finding(box, extent))
        self._add_all(sorted(odd.items()), annotations)
        ids = [a["id"] for a in annotations]
        whole = systematic_findings(boxes, shapes, np.array(sizes).reshape(-1, 2), masks, ids)
        self._add_all([(None, finding) for finding in whole], annotations)
        self._add_all(area_findings(annotations, shapes, sizes), annotations)
        self._add_all(copies(annotations), annotations)

    def _add_all(self, findings: Iterable[tuple[int | None, Finding]], annotations: list[dict]):
        """Add findings about an annotation, given by its index, or (None) about the whole file."""
        for index, finding in findings:
            if index is None:
                self.found.append(Problem(*finding))
            else:
                self._add(finding, annotations[index]["image_id"], annotations[index]["id"])

    def _check_set(self):
        if len({type(own) for own in self.images}) > 1:
            text = "ids of images are partly numbers and partly text; use one of them"
            self.found.append(Problem("error", "mixed-ids", text))
        sound = [image for own, image in self.images.items() if own not in self.broken]
        for image, finding in file_repeats(sound):
            self.found.append(Problem(*finding, image["file_name"]))
        annotated = {a["category_id"] for a in self.data["annotations"] if _is_id(a["category_id"])}
        if not self.data["annotations"]:
            self.found.append(Problem("warning", "no-annotation", "no image has an annotation"))
            return
        for category in self.data["categories"]:
            if category["id"] not in annotated:
                text = f"category {category['name']!r} has no annotation"
                self.found.append(Problem("warning", "unused-category", text))

    def _add(self, finding: Finding, image_id: Any, annotation_id: Any):
        image = self.images.get(image_id) if _is_id(image_id) else None
        name = str(image["file_name"]) if image else ""
        self.found.append(Problem(*finding, name, annotation_id))


def entry_problems(data: dict) -> list[Problem]:
    """Everything wrong with the entries of a file that `read_coco_file` read."""
    return _EntryCheck(data).run()


class CocoSummary(NamedTuple):
    """What is kept of a checked file; `images` are (file_name, width, height) of those that can be
    looked for."""

    categories: list[dict]
    problems: list[Problem]
    images: list[tuple[str, int, int]]


_summaries: dict[str, CocoSummary] = {}


def coco_summary(json_file: str) -> CocoSummary:
    """Read and check a COCO instances file, or recall the result while the file is unchanged and
    has no error.

    Raises:
        UserError: as `read_coco_file`.
    """
    key = fingerprint([json_file])
    known = _summaries.get(str(key))
    if known is None:
        stored = cache.load(["coco_file", key])
        if stored is not None:
            problems = [Problem(*p) for p in stored["problems"]]
            images = [tuple(image) for image in stored["images"]]
            known = CocoSummary(stored["categories"], problems, images)
    if known is None:
        started = time.perf_counter()
        data = read_coco_file(json_file)
        images = [
            (i["file_name"], i["width"], i["height"])
            for i in data["images"]
            if _image_finding(i) is None
        ]
        known = CocoSummary(data["categories"], entry_problems(data), images)
        if any(p.severity != "warning" for p in known.problems):
            return known
        if time.perf_counter() - started > cache.SLOW:
            cache.store(["coco_file", key], known._asdict())
    _summaries[str(key)] = known
    return known
