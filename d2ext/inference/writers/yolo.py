"""A YOLO data set for segmentation in `yolo`: `data.yaml`, `labels` and the images, as links where
they are files here. `d2ext convert yolo` reads it."""

import os
from pathlib import Path

import yaml

from d2ext.data.json_files import writing
from d2ext.inference.outlines import single_outline
from d2ext.inference.results import ImageResult
from d2ext.inference.writers.files import link_or_save


class YoloWriter:
    """One line per object: its class, and a polygon in fractions of the image. Several parts and
    holes are joined by cuts of no width; objects that cover no pixel are left out."""

    needs_image = True

    def __init__(self, folder: str, names: list[str]):
        self._root = Path(folder, "yolo")
        for part in ("images", "labels"):
            (self._root / part).mkdir(parents=True, exist_ok=True)
        data = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(names))}
        with writing(str(self._root / "data.yaml")) as f:
            yaml.safe_dump(data, f, sort_keys=False, allow_unicode=True)

    def write(self, result: ImageResult) -> None:
        link_or_save(result, self._root / "images")
        height, width = result.detections.size
        lines = []
        for label, mask in zip(result.detections.classes.tolist(), result.masks()):
            points = single_outline(mask)
            sides = (width, height) * (len(points) // 2)
            if points:
                words = (f"{value / side:.7g}" for value, side in zip(points, sides))
                lines.append(" ".join([str(label), *words]) + "\n")
        path = os.path.join(self._root, "labels", f"{result.stem}.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines)

    def close(self) -> None:
        pass
