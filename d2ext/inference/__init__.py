"""Prediction for many images: where they come from, batches, files of results, and jobs that
several processes share and that can be interrupted."""

from d2ext import compat

compat.require_detectron2()

from d2ext.inference.batching import Prediction, Preparation, decode_images, predict_in_batches
from d2ext.inference.pixels import AnyImage, read_bgr
from d2ext.inference.records import ImageRecord, as_record
from d2ext.inference.sources import Source, find_images, open_source

__all__ = [
    "AnyImage",
    "ImageRecord",
    "Prediction",
    "Preparation",
    "Source",
    "as_record",
    "decode_images",
    "find_images",
    "open_source",
    "predict_in_batches",
    "read_bgr",
]
