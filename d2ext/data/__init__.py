"""Data sets, input mapper and loaders. Call `register_all()` before using a data set by name."""

from d2ext import compat

compat.patch_data()

from .builtin import register_all, register_shapes  # noqa: E402

__all__ = ["register_all", "register_shapes"]
