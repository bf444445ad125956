"""Saving and loading of checkpoints, our own and those of other programs."""

from d2ext import compat

compat.require_detectron2()

from d2ext.checkpoint.checkpointer import Checkpointer, read_metadata
from d2ext.checkpoint.formats import CheckpointFile, read_file
from d2ext.checkpoint.importing import import_weights, list_importers
from d2ext.checkpoint.mapping import Conversion, Rule, export_weights
from d2ext.checkpoint.registry import Importer, register_importer
from d2ext.checkpoint.rng import RNGState, preserve_rng

__all__ = [
    "CheckpointFile",
    "Checkpointer",
    "Conversion",
    "Importer",
    "RNGState",
    "Rule",
    "export_weights",
    "import_weights",
    "list_importers",
    "preserve_rng",
    "read_file",
    "read_metadata",
    "register_importer",
]
