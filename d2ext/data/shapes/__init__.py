"""The built-in shapes data set: small generated images with instance masks and semantic maps."""

from d2ext.data.shapes.draw import STUFF_CLASSES, THING_CLASSES
from d2ext.data.shapes.files import (
    FORMAT_VERSION,
    SPLITS,
    Split,
    content_hash,
    find_damage,
    generate,
    read_manifest,
    split_folder,
    stuff_classes,
)
from d2ext.data.shapes.registration import paths, register_shapes

__all__ = [
    "FORMAT_VERSION",
    "SPLITS",
    "STUFF_CLASSES",
    "THING_CLASSES",
    "Split",
    "content_hash",
    "find_damage",
    "generate",
    "paths",
    "read_manifest",
    "register_shapes",
    "split_folder",
    "stuff_classes",
]
