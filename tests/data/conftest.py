"""A small COCO data set to be spoilt: one image with a triangle and a run-length encoded block."""

import copy
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2ext.data import (
    InstanceSegMapper,
    check_files,
    get_dataset_records,
    register_coco_dataset,
)

WIDTH, HEIGHT = 12, 10
BLOCK = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
BLOCK[5:9, 6:11] = 1


def _rle(mask):
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


VALID = {
    "images": [{"id": 4, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
    "annotations": [
        {"id": 1, "bbox": [1, 1, 8, 6], "segmentation": [[1, 1, 9, 1, 9, 7]], "area": 24.0},
        {"id": 2, "bbox": [6, 5, 5, 4], "segmentation": _rle(BLOCK), "area": 20.0},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
}
for _annotation, _category in zip(VALID["annotations"], (7, 9)):
    _annotation.update(image_id=4, category_id=_category, iscrowd=0)


class SmallDataset:
    """Folders `images` and `semantic`, and the content of the annotation file."""

    def __init__(self, folder):
        self.folder = folder
        self.images, self.maps = folder / "images", folder / "semantic"
        self.json_file = folder / "annotations.json"
        self.data = copy.deepcopy(VALID)
        self.pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        self.use_maps = False
        self.images.mkdir()
        self.maps.mkdir()
        Image.fromarray(self.pixels).save(self.images / "a.png")
        Image.new("L", (WIDTH, HEIGHT), 1).save(self.maps / "a.png")

    @property
    def first(self):
        return self.data["annotations"][0]

    @property
    def second(self):
        return self.data["annotations"][1]

    def write(self, text=None):
        self.json_file.write_text(json.dumps(self.data) if text is None else text)

    def roots(self):
        return str(self.json_file), str(self.images), str(self.maps) if self.use_maps else None

    def check(self, **kwargs):
        """The report of the data check."""
        return check_files("small", *self.roots(), **kwargs)

    def load(self, **kwargs):
        """The first input of a training, through registration, loader and mapper."""
        register_coco_dataset("small", *self.roots())
        kwargs = {"num_classes": 2, "semantic": "dataset" if self.use_maps else "none", **kwargs}
        mapper = InstanceSegMapper(True, augmentations=[], image_format="RGB", **kwargs)
        (record,) = get_dataset_records("small")
        return mapper(record)


@pytest.fixture
def small_dataset(tmp_path):
    return SmallDataset(tmp_path)
