"""What a pickle gets instead of the functions and classes that it asks for: nothing that has an
effect, and NumPy's arrays with their sizes checked."""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from d2ext.checkpoint.formats.common import FormatError

# Functions and classes of torch that weights need; no others of torch are called.
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_OF_TORCH = {*(f"torch._utils.{x}" for x in _REBUILD), "torch.Size", "torch.device"}


class Opaque:
    """Stands for an object that was not rebuilt; each kind of them gets a class of its own.

    Attributes:
        source: the name that the pickle asks for.
        items: list or OrderedDict, if items were added to an object.
        keys: of the items of a dict.
        hides: whether an object has attributes with the names of a dict's methods.
        made_as: what a call returns instead of such an object; torch adds items to nothing else.
    """

    source = "?"
    items: type | None = None
    hides = False
    made_as: type | None = None

    def __new__(cls, *args, **kwargs):
        # torch has these itself, and a bytearray of an integer is so many zeros.
        if cls.source.startswith(("torch.", "builtins.bytearray")) and cls.source not in _OF_TORCH:
            raise FormatError(f"it uses {cls.source[:60]}, which is not supported")
        if cls.made_as:
            return cls.made_as()
        made = object.__new__(cls)
        made.keys = {}
        return made

    def __setstate__(self, state: Any) -> None:
        state = self.keys if state is self else state
        self._change(hides=self.hides or hides_methods(state))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.keys[key] = None
        self._change(items=OrderedDict)

    def append(self, item: Any) -> None:
        self._change(items=list)

    extend = append

    def _change(self, **attributes: Any) -> None:
        if self.source.startswith("torch."):
            raise FormatError(f"it changes what {self.source[:60]} returned")
        for name, value in attributes.items():
            setattr(type(self), name, value)

    def __deepcopy__(self, memo: Any) -> "Opaque":
        return self

    def __repr__(self) -> str:
        return f"<{self.source}, not loaded>"


class Dtype:
    """A numpy dtype: its name, then its byte order."""

    def __init__(self, name: Any, *args):
        self.name, self.order = name if isinstance(name, str) else "?", "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if not re.fullmatch("b1|[iu][1248]|f[248]", self.name):
            raise FormatError(f"arrays of type '{self.name[:20]}' are not supported")
        return np.dtype(self.name).newbyteorder(">" if self.order == ">" else "<")


class Array(np.ndarray):
    """A numpy array, first empty."""

    def __new__(cls, *args):
        raise FormatError("an array is made in an unknown way")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data  # as Python 2 wrote bytes
        if not isinstance(data, bytes) or len(shape) > 32 or any(n < 0 for n in shape):
            raise FormatError("an array has no plain bytes or no shape")
        kind = dtype.numpy()
        if math.prod(shape) * kind.itemsize != len(data):
            raise FormatError(f"an array of shape {shape} has {len(data) // kind.itemsize} values")
        super().__setstate__((1, shape, kind, bool(fortran), data))


def _array(shape: Any, dtype: Any, data: Any, order: Any = "C") -> Array:
    array = np.ndarray.__new__(Array, 0)
    data = data if isinstance(data, str) else bytes(memoryview(data))
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise FormatError("an unknown encoding of bytes")
    return text.encode(encoding)


def checked(items: Iterable[Any], index: int | None = None) -> Iterable[Any]:
    """The items; they, or one part of each, become keys."""
    for item in items:
        key = item if index is None else item[index]
        # Large integers can be chosen to have the same hash.
        if type(key) not in (str, bytes, int, float, bool) or type(key) is int and abs(key) >> 60:
            raise FormatError("a key of a dict or a member of a set is no text and no number")
    return items


def hides_methods(state: Any) -> bool:
    """Whether attributes of a dict, which torch sets, would hide its methods."""
    return not isinstance(state, dict) or any(hasattr(OrderedDict, str(key)) for key in state)


FUNCTIONS = {
    "collections.OrderedDict": lambda pairs=(): OrderedDict(checked([(k, v) for k, v in pairs], 0)),
    "collections.Counter": lambda items=(): Counter(
        items if type(items) is dict else checked(items)
    ),
    "builtins.set": lambda items=(): set(checked(items)),
    "builtins.bytes": lambda: b"",  # which others are made by encoding
    "_codecs.encode": _encode,
}
_NUMPY = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    "numpy.core.multiarray._reconstruct": lambda kind, *_: np.ndarray.__new__(
        kind if issubclass(kind, Array) else Array, 0
    ),
    "numpy.core.multiarray.scalar": lambda dtype, data: _array((), dtype, data).item(),
    "numpy.core.numeric._frombuffer": lambda data, *rest: _array(rest[1], rest[0], data, rest[2]),
}


def stand_in(source: str) -> type:
    """A class of the given full name, so that torch takes it for what a file asks for."""
    module, _, name = source.rpartition(".")
    members = {"__module__": module, "__qualname__": name, "source": source}
    known = {**FUNCTIONS, **_NUMPY}
    base = known.get(source.replace("numpy._core.", "numpy.core."), Opaque)
    if not isinstance(base, type):
        members["__new__"] = lambda cls, *args, make=base: make(*args)
        base = object
    return type(name, (base,), members)
