"""Saving and loading of checkpoints."""

from d2ext.checkpoint.checkpointer import Checkpointer, read_metadata
from d2ext.checkpoint.rng import RNGState, preserve_rng

__all__ = ["Checkpointer", "RNGState", "preserve_rng", "read_metadata"]
