"""COCO files: an instances file that training and annotation programs take, with a score for each
object; and the list of results."""

import contextlib
import json
import os
from typing import IO

import pycocotools.mask as mask_util

from d2ext.data.json_files import writing
from d2ext.inference.outlines import outlines
from d2ext.inference.results import ImageResult

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances


def annotation_of(detection: dict, size: tuple[int, int], polygons: bool) -> dict:
    """An annotation without ids.

    Args:
        detection: `category_id`, `bbox` (x, y, width, height), `score`, and, of a model with masks,
            `segmentation`, COCO's run-length code as text, and `mask_score`.
        size: (height, width) of the image.
        polygons: whether masks are written as polygons.
    """
    found = {"category_id": detection["category_id"], "bbox": detection["bbox"], "iscrowd": 0}
    found["area"] = detection["bbox"][2] * detection["bbox"][3]
    counts = detection.get("segmentation")
    if counts is not None:
        rle = {"size": list(size), "counts": counts}
        found["area"] = int(mask_util.area(rle))
        found["segmentation"] = outlines(mask_util.decode(rle)) if polygons else rle
    found["score"] = detection["score"]
    if detection.get("mask_score") is not None:
        found["mask_score"] = detection["mask_score"]
    return found


class CocoFile:
    """An instances file that grows image by image, with ids of annotations from 1; a context, at
    whose end it takes its place.

    Args:
        path: of the file.
        categories: `{"id", "name"}` each.
        polygons: see `annotation_of`.

    Attributes:
        images, annotations: how many it has.
    """

    def __init__(self, path: str, categories: list[dict], polygons: bool = False):
        self._path, self._categories, self._polygons = path, categories, polygons
        self._stack = contextlib.ExitStack()
        self._file: IO[str] | None = None
        self._images: list[str] = []
        self.annotations = 0

    @property
    def images(self) -> int:
        return len(self._images)

    def __enter__(self) -> "CocoFile":
        self._file = self._stack.enter_context(writing(self._path))
        self._file.write('{"annotations": [')
        return self

    def add(self, image_id: int, name: str, size: tuple[int, int], detections: list[dict]) -> None:
        """Add an image of (height, width) with its detections, see `annotation_of`."""
        assert self._file is not None, "enter the context first"
        image = {"id": image_id, "file_name": name, "width": size[1], "height": size[0]}
        self._images.append(json.dumps(image))
        for detection in detections:
            self.annotations += 1
            entry = {"id": self.annotations, "image_id": image_id}
            entry |= annotation_of(detection, size, self._polygons)
            separator = "\n" if self.annotations == 1 else ",\n"
            self._file.write(separator + json.dumps(entry))

    def __exit__(self, *error) -> None:
        if error[0] is None and self._file is not None:
            images = ",\n".join(self._images)
            self._file.write(f'],\n"images": [{images}],\n')
            self._file.write(f'"categories": {json.dumps(self._categories)}}}\n')
        self._stack.__exit__(*error)


class CocoWriter:
    """`coco.json`, or `coco_polygons.json` with masks as polygons."""

    needs_image = False

    def __init__(self, folder: str, names: list[str], ids: list[int], polygons: bool = False):
        name = "coco_polygons.json" if polygons else "coco.json"
        categories = [{"id": number, "name": text} for number, text in zip(ids, names)]
        self._names, self._ids = names, ids
        self._file = CocoFile(os.path.join(folder, name), categories, polygons)
        self._file.__enter__()

    def write(self, result: ImageResult) -> None:
        from d2ext.inference.table import detections_of

        found = detections_of(result.detections, self._names, self._ids)
        record = result.record
        self._file.add(record.image_id, record.name, result.detections.size, found)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


def coco_results(
    instances: Instances, image_id: int, path: str, class_names: list[str]
) -> list[dict]:
    """COCO results of one image, plus `file_name`, `category` (the name) and `mask_score`
    where the model scores its masks."""
    results = [
        {**result, "file_name": str(path), "category": class_names[result["category_id"]]}
        for result in instances_to_coco_json(instances, image_id)
    ]
    if instances.has("mask_scores"):
        for result, score in zip(results, instances.mask_scores.tolist()):
            result["mask_score"] = score
    return results


class ResultsWriter:
    """`predictions.json`: a list of COCO results whose `category_id` counts from 0."""

    needs_image = False

    def __init__(self, folder: str, names: list[str]):
        self._names, self._stack = names, contextlib.ExitStack()
        path = os.path.join(folder, "predictions.json")
        self._file = self._stack.enter_context(writing(path))
        self._separator = "["

    def write(self, result: ImageResult) -> None:
        record = result.record
        for entry in coco_results(result.instances, record.image_id, record.name, self._names):
            self._file.write(self._separator + json.dumps(entry))
            self._separator = ", "

    def close(self) -> None:
        self._file.write("]" if self._separator != "[" else "[]")
        self._stack.close()
