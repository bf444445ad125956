"""Files of labelme in `labelme`, one per image, to correct predictions by hand. `d2ext convert
labelme` reads them."""

import json
import os
from pathlib import Path

import numpy as np

from d2ext.data.json_files import writing
from d2ext.inference.outlines import outlines
from d2ext.inference.results import ImageResult
from d2ext.inference.writers.files import link_or_save, local_file


class LabelmeWriter:
    """A polygon for each part of an object; parts of one object have one `group_id`. Holes are
    joined by cuts of no width. An image that is no file here is written beside its file."""

    needs_image = True

    def __init__(self, folder: str, names: list[str]):
        self._root, self._names = Path(folder, "labelme"), names
        self._root.mkdir(parents=True, exist_ok=True)

    def write(self, result: ImageResult) -> None:
        source = local_file(result)
        if source is None:
            source = str(link_or_save(result, self._root))
        height, width = result.detections.size
        data = {
            "version": "5.4.1",
            "flags": {},
            "shapes": self._shapes(result),
            "imagePath": os.path.relpath(source, self._root).replace(os.sep, "/"),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        with writing(str(self._root / f"{result.stem}.json")) as f:
            json.dump(data, f, indent=1, ensure_ascii=False)

    def _shapes(self, result: ImageResult) -> list[dict]:
        found, shapes = result.detections, []
        labels, scores = found.classes.tolist(), found.scores.tolist()
        for number, (label, score, mask) in enumerate(zip(labels, scores, result.masks()), 1):
            parts = outlines(mask)
            for part in parts:
                shapes.append(
                    {
                        "label": self._names[label],
                        "points": np.reshape(part, (-1, 2)).tolist(),
                        "group_id": number if len(parts) > 1 else None,
                        "description": f"score {score:.3f}",
                        "shape_type": "polygon",
                        "flags": {},
                    }
                )
        return shapes

    def close(self) -> None:
        pass
