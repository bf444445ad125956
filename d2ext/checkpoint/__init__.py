"""Saving and loading of checkpoints."""

from d2ext import compat

compat.require_detectron2()

from d2ext.checkpoint.checkpointer import Checkpointer, read_metadata  # noqa: E402
from d2ext.checkpoint.rng import RNGState, preserve_rng  # noqa: E402

__all__ = ["Checkpointer", "RNGState", "preserve_rng", "read_metadata"]
