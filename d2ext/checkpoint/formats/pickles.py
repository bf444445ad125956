"""Reads pickles of arrays and plain values, such as detectron2's `.pkl`, and looks through those
in files of torch before torch reads them.

A pickle is a program. Here it gets inert stand-ins for whatever it asks for, so that nothing of a
file runs. Nor may it misuse what the standard library does by itself: a tuple of tuples as a key,
once hashed, takes forever or overflows the stack, so keys are text or numbers; and no number asks
for memory that the file does not fill.
"""

import mmap
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from d2ext.checkpoint.formats.common import FormatError

_MOST_NAMES = 1000
_SIZED = (str, bytes, bytearray, list, tuple, dict, set)
_ITEM_SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
_ITEM_SIZES.update({"Char": 1, "Byte": 1, "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16})
# What weights need of torch, which has these and others itself.
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_OF_TORCH = {*(f"torch._utils.{x}" for x in _REBUILD), "torch.Size", "torch.device"}


class Opaque:
    """Stands for an object that was not rebuilt; each kind of them gets a class of its own.

    Attributes:
        source: the name that the pickle asks for.
        items: list or OrderedDict, if items were added to an object of the kind.
        made: collects what torch gets instead of such objects; it adds items to nothing else.
    """

    source = "?"
    items: type | None = None
    made: list[Any] | None = None

    def __new__(cls, *args, **kwargs):
        # A bytearray of an integer is so many zeros.
        if cls.source.startswith(("torch.", "builtins.bytearray")) and cls.source not in _OF_TORCH:
            raise FormatError(f"it uses {cls.source[:60]}, which is not supported")
        if cls.made is None or cls.items is None:
            return object.__new__(cls)
        cls.made.append(cls.items())
        return cls.made[-1]

    def __setstate__(self, state: Any) -> None:
        if self.source.startswith("torch."):
            raise FormatError(f"it changes what {self.source[:60]} returned")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__setstate__(None)
        type(self).items = OrderedDict

    def append(self, item: Any) -> None:
        self.__setstate__(None)
        type(self).items = list

    extend = append

    def __deepcopy__(self, memo: Any) -> "Opaque":
        return self

    def __repr__(self) -> str:
        return f"<{self.source}, not loaded>"


class _Dtype:
    """A numpy dtype: its name, then its byte order."""

    def __init__(self, name: Any, *args):
        name = name if isinstance(name, str) else "?"
        if not re.fullmatch("b1|[iu][1248]|f[248]", name):
            raise FormatError(f"arrays of type '{name[:20]}' are not supported")
        self.kind = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.kind = self.kind.newbyteorder(state[1])


class _Array(np.ndarray):
    """A numpy array, first empty."""

    def __new__(cls, *args):
        raise FormatError("an array is made in an unknown way")

    def __setstate__(self, state: Any) -> None:
        array = _array(*state[1:])
        super().__setstate__((1, array.shape, array.dtype, False, array.tobytes()))


def _array(shape: Any, dtype: Any, fortran: Any, data: Any) -> np.ndarray:
    data = memoryview(data.encode("latin1") if isinstance(data, str) else data)  # Python 2's bytes
    array = np.ndarray(shape, dtype.kind, data, order="F" if fortran else "C")
    if array.nbytes != data.nbytes:
        raise FormatError(f"an array of shape {array.shape} has {data.nbytes} bytes")
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise FormatError("an unknown encoding of bytes")
    return text.encode(encoding)


def _ordered(pairs: Any = ()) -> OrderedDict:
    _checked([key for key, _ in pairs])
    return OrderedDict(pairs)


def _checked(keys: Iterable[Any]) -> Iterable[Any]:
    for key in keys:
        # Large integers can be chosen to have the same hash.
        if type(key) not in (str, bytes, int, float, bool) or type(key) is int and abs(key) >> 60:
            raise FormatError("a key of a dict or a member of a set is no text and no number")
    return keys


_FUNCTIONS = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": lambda items=(): Counter(_checked(items)),
    "builtins.set": lambda items=(): set(_checked(items)),
    "builtins.bytes": lambda: b"",  # which others are made by encoding
    "_codecs.encode": _encode,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": lambda kind, *_: np.ndarray.__new__(kind, 0),
    "numpy.core.multiarray.scalar": lambda dtype, data: _array((), dtype, False, data).item(),
    "numpy.core.numeric._frombuffer": lambda data, *rest: _array(
        rest[1], rest[0], rest[2] == "F", data
    ).copy("K"),
}


def stand_in(source: str) -> Callable:
    """A class or function of the given full name, so that torch takes it for that."""
    module, _, name = source.rpartition(".")
    base = _FUNCTIONS.get(source.replace("numpy._core.", "numpy.core."), Opaque)
    if isinstance(base, type):
        return type(name, (base,), {"__module__": module, "__qualname__": name, "source": source})

    def function(*args):
        return base(*args)

    function.__module__, function.__qualname__ = module, name
    return function


class Unpickler(pickle._Unpickler):
    """The standard library's reader in Python, which checks keys before they are hashed.

    Args:
        stream: a binary file, left behind the last instruction.
        size: number of bytes of the file, which bounds what is copied.

    Attributes:
        stand_ins: by the names that the pickle asks for.
        storages: {key: number of bytes} of torch.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: BinaryIO, size: int):
        super().__init__(stream, encoding="latin1")
        self.stand_ins: dict[str, Callable] = {}
        self.storages: dict[str, int] = {}
        self._budget = 4 * size + (1 << 20)

    def load(self) -> Any:
        try:
            return super().load()
        except FormatError:
            raise
        except Exception as error:  # whatever an instruction makes of values it is not for
            raise FormatError(f"a pickle in it is damaged ({type(error).__name__})") from error

    def find_class(self, module: str, name: str) -> Callable:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        source = f"{module}.{name}"
        if source not in self.stand_ins:
            self.stand_ins[source] = stand_in(source)
            if len(self.stand_ins) > _MOST_NAMES:
                raise FormatError(f"it asks for more than {_MOST_NAMES} classes")
        return self.stand_ins[source]

    def persistent_load(self, pid: Any) -> None:
        """Note a storage of torch."""
        tag, kind, key, place, count, *view = pid
        name = getattr(kind, "source", "").removeprefix("torch.").removesuffix("Storage")
        if name not in _ITEM_SIZES:
            raise FormatError(f"a storage of the unknown type '{name[:60]}'")
        parts = view[0] if view and isinstance(view[0], tuple) else view
        types = [type(x) for x in (tag, key, place, count, *parts)]
        if types[:4] != [str, str, str, int] or not set(types) <= {str, int, type(None)}:
            raise FormatError("a storage is not described by texts and numbers")
        self.storages[key] = count * _ITEM_SIZES[name]

    def _charge(self, values: Any) -> None:
        parts = values if isinstance(values, tuple) else ()
        self._budget -= sum(len(x) for x in (values, *parts) if isinstance(x, _SIZED))
        if self._budget < 0:
            raise FormatError("it copies the same values again and again")

    def _check_entries(self, target: Any, keys: list[Any]) -> None:
        if not isinstance(target, (dict, Opaque)):
            raise FormatError(f"entries for a {type(target).__name__}")
        _checked(keys)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self._charge(state)
        if isinstance(target, (Opaque, _Dtype, _Array)):
            target.__setstate__(state)
        elif type(target) is not OrderedDict or any(hasattr(target, str(key)) for key in state):
            raise FormatError("it changes something that is no object, or its methods")

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))


def _after(check: Callable, load: Callable) -> Callable:
    """An instruction that follows a check of the values it works on."""
    return lambda self: (check(self), load(self))


_CHECKS = {
    "REDUCE": lambda self: self._charge(self.stack[-1]),
    "NEWOBJ": lambda self: self._charge(self.stack[-1]),
    "SETITEM": lambda self: self._check_entries(self.stack[-3], self.stack[-2:-1]),
    "SETITEMS": lambda self: self._check_entries(self.metastack[-1][-1], self.stack[::2]),
    "DICT": lambda self: _checked(self.stack[::2]),
    "ADDITEMS": lambda self: _checked(self.stack),
    "FROZENSET": lambda self: _checked(self.stack),
}
for _name, _check in _CHECKS.items():
    _code = getattr(pickle, _name)[0]
    Unpickler.dispatch[_code] = _after(_check, Unpickler.dispatch[_code])
Unpickler.dispatch[pickle.BUILD[0]] = Unpickler.load_build
Unpickler.dispatch[pickle.BYTEARRAY8[0]] = Unpickler.load_bytearray8
del Unpickler.dispatch[pickle.NEWOBJ_EX[0]]  # neither NumPy nor torch writes it


def read_pickle(path: str, data: mmap.mmap) -> Any:
    """The value of a pickle, with an `Opaque` for each object."""
    return Unpickler(data, len(data)).load()
