"""The operators by name, as they run and as PyTorch implements them, and how results are compared.

A new operator is found by itself: it is among those defined, and its PyTorch implementation has the
same name in a module of `d2ext.ops.reference`.
"""

import importlib
import pkgutil
from types import SimpleNamespace

import torch

from d2ext.ops import _library
from d2ext.ops import reference as package


def _reference(name):
    """The PyTorch implementation of an operator."""
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(found.name)
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"no module of {package.__name__} has {name}")


# As the dispatcher runs them, and the PyTorch implementations.
ops = SimpleNamespace(**{name: getattr(torch.ops.d2ext, name) for name in _library.operators()})
reference = SimpleNamespace(**{name: _reference(name) for name in _library.operators()})


def relative_error(value, oracle):
    """Norm of the difference over the norm of the oracle, both in float64."""
    value, oracle = value.double(), oracle.double()
    assert value.shape == oracle.shape
    return float((value - oracle).norm() / oracle.norm().clamp(min=1e-300))
