"""Predictions of a model on all images of a data set, with time and memory."""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from d2ext.engine import Predictor
from d2ext.errors import UserError
from d2ext.evaluation import GroundTruth
from d2ext.evaluation.ground_truth import by_image
from d2ext.evaluation.predictions import ImageDetections, collect
from d2ext.report.entry import Detections, Speed

from detectron2.data.detection_utils import read_image


def has_stages(predictor: Predictor) -> bool:
    """Whether a model can say what it finds after each of its stages."""
    return hasattr(predictor.model, "inference_stages")


@torch.no_grad()
def predict_records(
    predictor: Predictor, records: Sequence[dict], truth: GroundTruth, name: str
) -> tuple[Detections, Speed]:
    """What a model finds in the image files of a data set, and how fast.

    Args:
        predictor: of the model.
        records: of the data set.
        truth: its annotations, for the order and the sizes of the images.
        name: of the model, for the progress bar.

    Raises:
        UserError: an image cannot be read, or has another size than its annotations.
    """
    device = torch.device(str(predictor.model.device))
    found, seconds = [], []
    peak = _PeakMemory(device)
    for record in tqdm(records, desc=name, unit="img", disable=None, leave=False):
        image = _read(record)
        begin = time.perf_counter()
        instances = predictor(image)["instances"]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        found.append(collect(instances, record["image_id"]))
    # The first image also waits for whatever is set up only once.
    median = float(np.median(seconds[1:] or seconds))
    return by_image(truth, found), Speed(median, peak.value(), describe_device(device))


@torch.no_grad()
def predict_stages(
    predictor: Predictor, records: Sequence[dict], truth: GroundTruth, name: str
) -> list[Detections]:
    """What a cascade finds after each stage; arguments as for `predict_records`."""
    stages: list[list[ImageDetections]] = []
    model: Any = predictor.model
    for record in tqdm(records, desc=f"{name}, stages", unit="img", disable=None, leave=False):
        outputs = model.inference_stages([predictor.prepare(_read(record))])
        stages = stages or [[] for _ in outputs]
        for stage, output in zip(stages, outputs):
            stage.append(collect(output[0]["instances"], record["image_id"]))
    return [by_image(truth, stage) for stage in stages]


def _read(record: dict) -> np.ndarray:
    try:
        return read_image(record["file_name"], "BGR")
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read image {record['file_name']}: {reason}") from error


def describe_device(device: torch.device) -> str:
    """The GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'' if count == 1 else 's'}"


class _PeakMemory:
    """The most memory in use since it was made: of a GPU, or of this process, where Linux tells."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._known = False
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._known = True

    def value(self) -> int | None:
        """In bytes; None where it is not known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known or not os.path.isfile("/proc/self/status"):
            return None
        text = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"VmHWM:\s*(\d+) kB", text)
        return int(found[1]) * 1024 if found else None
