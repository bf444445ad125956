"""Images with random outlines for dev/benchmark_models.py, and the mappers that load them."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from torch.utils.data import DataLoader

from d2ext.data import InstanceSegMapper

from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

BASE = "detectron2 polygon"
WARM = 4  # images that are loaded before the time is taken
HEIGHT, WIDTH = 480, 640


def make_record(folder: str, objects: int, encoded: bool = False) -> dict:
    """A JPEG with outlines of 12 to 50 points, sides log-uniform in 16..240 pixels."""
    draw = np.random.default_rng(0)
    path = Path(folder, "image.jpg")
    noise = draw.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.uint8)
    Image.fromarray(cv2.resize(noise, (WIDTH, HEIGHT))).save(path, quality=90)
    annotations = []
    for _ in range(objects):
        side = 16 * 15 ** draw.uniform()
        angle = np.sort(draw.uniform(0, 2 * np.pi, draw.integers(12, 50)))
        radius = side / 2 * draw.uniform(0.6, 1, len(angle))
        stretch = draw.uniform(0.6, 1.6)
        x = draw.uniform(0, WIDTH) + radius * np.cos(angle) * stretch
        y = draw.uniform(0, HEIGHT) + radius * np.sin(angle) / stretch
        points = np.stack([x.clip(0, WIDTH), y.clip(0, HEIGHT)], 1).round(2)
        outline = [points.ravel().tolist()]
        if encoded:
            outline = mask_util.merge(mask_util.frPyObjects(outline, HEIGHT, WIDTH))
        annotations.append(
            {
                "bbox": [*points.min(0).tolist(), *points.max(0).tolist()],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": int(draw.integers(80)),
                "iscrowd": 0,
                "segmentation": outline,
            }
        )
    record = {"file_name": str(path), "image_id": 0, "height": HEIGHT, "width": WIDTH}
    return {**record, "annotations": annotations}


def runs(folder: str, objects: int) -> dict[str, Callable]:
    """Functions that load one image each: 800 pixels, flipped at random."""
    polygons, encoded = (make_record(folder, objects, e) for e in (False, True))
    augmentations = [T.ResizeShortestEdge((800,), 1333, "choice"), T.RandomFlip()]
    common = {"is_train": True, "augmentations": augmentations, "image_format": "BGR"}
    theirs = {
        f"detectron2 {m}": DatasetMapper(**common, use_instance_mask=True, instance_mask_format=m)
        for m in ("polygon", "bitmask")
    }
    ours = {
        f"ours {m}, semantic {s}": InstanceSegMapper(
            **common, mask_format=m, semantic=s, num_classes=80
        )
        for m in ("polygon", "bitmask")
        for s in ("none", "instances")
    }
    calls = {name: lambda m=mapper: m(polygons) for name, mapper in {**theirs, **ours}.items()}
    derived = ours["ours bitmask, semantic instances"]
    calls["ours bitmask, semantic instances, of RLE"] = lambda: derived(encoded)
    return calls


def in_a_loading_process(runs: dict[str, Callable], rounds: int, images: int = 40) -> dict:
    """Median seconds per image of each, in turns, that one worker of a `DataLoader` loads and hands
    on to this process."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            loader = iter(
                DataLoader(
                    [run] * (images + WARM),
                    batch_size=None,
                    num_workers=1,
                    collate_fn=_call,
                    worker_init_fn=_one_thread,
                )
            )
            for _ in range(WARM):
                next(loader)
            begin = time.perf_counter()
            loaded = sum(1 for _ in loader)
            times[name].append((time.perf_counter() - begin) / loaded)
    return {name: statistics.median(values) for name, values in times.items()}


def _call(run: Callable):
    return run()


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
