"""Reads pickles without executing them.

A pickle is a program: the standard library's reader calls whatever functions it names. This one
interprets the same instructions on plain values only (numbers, text, lists, dicts, arrays) and puts
an inert :class:`Opaque` wherever the pickle asks for anything else, so that meta data of foreign
programs is skipped and nothing of the file ever runs. Time and memory are bounded by the size of
the file.
"""

import collections
import io
import pickletools
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

from .common import FormatError, as_tensor, element_count

__all__ = ["Global", "Opaque", "PickleReader", "load_pickle"]


class Global(collections.namedtuple("Global", "module name")):
    """The name of something that a pickle asks for."""

    @property
    def source(self) -> str:
        """As Python writes it."""
        return f"{self.module}.{self.name}"


class Opaque:
    """Stands for an object that was not rebuilt."""

    def __init__(self, source: Any = None):
        self.source = source.source if isinstance(source, Global) else "?"

    def __repr__(self) -> str:
        return f"<{self.source}, not loaded>"


class _Dtype:
    """A numpy dtype under construction: its name, then its byte order."""

    def __init__(self, name: Any):
        self.name = str(name).lstrip("<>=|")
        self.order = "<"

    def set_state(self, state: Any) -> None:
        self.order = state[1]

    def __str__(self) -> str:
        if self.name in ("bool", "b1", "?"):
            return "|b1"
        if len(self.name) != 2 or self.name[0] not in "fiu" or self.name[1] not in "1248":
            raise FormatError(f"arrays of type '{self.name[:20]}' are not supported")
        return (self.order if self.order in ("<", ">") else "|") + self.name


class _Array:
    """A numpy array under construction."""

    value: Optional[np.ndarray] = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):  # how Python 2 wrote bytes
            data = data.encode("latin-1")
        self.value = _array(data, dtype, shape, fortran)


def _array(data: Any, dtype: Any, shape: Any, fortran: Any = False) -> np.ndarray:
    if not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise FormatError("an array has no plain bytes or no shape")
    text = str(dtype)
    shape = tuple(reversed(shape)) if fortran else shape
    array = as_tensor(memoryview(data), text, shape).numpy()
    return array.T if fortran else array


class PickleReader:
    """Interprets one pickle.

    Args:
        persistent: called with a persistent id (how torch refers to its storages).
        budget (int): elements that may be copied altogether; the size of the file.
    """

    def __init__(self, persistent: Optional[Callable] = None, budget: int = 0):
        self.persistent = persistent
        self.budget = budget
        self._stack: List[Any] = []
        self._marks: List[List[Any]] = []
        self._memo: Dict[int, Any] = {}

    def read(self, stream) -> Any:
        """The value of the pickle that starts at the position of ``stream``, a binary file that is
        left behind its last instruction."""
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name == "STOP":
                return _finished(self._stack.pop())
            elif hasattr(self, f"_{name}"):
                getattr(self, f"_{name}")(argument)
            else:
                raise FormatError(f"the instruction {name} is not supported")
        raise FormatError("the pickle has no end")

    # The instructions; their names and meaning are those of pickletools.

    def _PROTO(self, _):
        pass

    _FRAME = _PROTO

    def _MARK(self, _):
        self._marks.append(self._stack)
        self._stack = []

    def _items(self) -> List[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return [_finished(x) for x in items]

    def _pop(self) -> Any:
        return _finished(self._stack.pop())

    def _POP(self, _):
        if self._stack:
            self._stack.pop()
        else:
            self._items()

    def _POP_MARK(self, _):
        self._items()

    def _DUP(self, _):
        self._stack.append(self._stack[-1])

    def _BINPUT(self, index):
        self._memo[index] = self._stack[-1]

    _PUT = _LONG_BINPUT = _BINPUT

    def _MEMOIZE(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def _BINGET(self, index):
        self._stack.append(self._memo[index])

    _GET = _LONG_BINGET = _BINGET

    def _LIST(self, _):
        items = self._items()
        self._stack.append(items)

    def _TUPLE(self, _):
        items = self._items()
        self._stack.append(tuple(items))

    def _FROZENSET(self, _):
        items = self._items()
        self._stack.append(frozenset(items))

    def _DICT(self, _):
        items = self._items()
        self._stack.append(dict(zip(items[::2], items[1::2])))

    def _tuple_of(self, n: int) -> None:
        items = [self._pop() for _ in range(n)]
        self._stack.append(tuple(reversed(items)))

    def _TUPLE1(self, _):
        self._tuple_of(1)

    def _TUPLE2(self, _):
        self._tuple_of(2)

    def _TUPLE3(self, _):
        self._tuple_of(3)

    def _extend(self, items: List[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(items)
        elif not isinstance(target, Opaque):
            raise FormatError(f"items for a {type(target).__name__}")

    def _APPEND(self, _):
        item = self._pop()
        self._extend([item])

    def _APPENDS(self, _):
        self._extend(self._items())

    _ADDITEMS = _APPENDS

    def _set_items(self, items: List[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(zip(items[::2], items[1::2]))
        elif not isinstance(target, Opaque):
            raise FormatError(f"entries for a {type(target).__name__}")

    def _SETITEM(self, _):
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _SETITEMS(self, _):
        self._set_items(self._items())

    def _GLOBAL(self, argument):
        self._stack.append(Global(*argument.split(" ", 1)))

    def _STACK_GLOBAL(self, _):
        name, module = self._pop(), self._pop()
        self._stack.append(Global(str(module), str(name)))

    def _REDUCE(self, _):
        arguments, function = self._pop(), self._pop()
        self._stack.append(self._call(function, arguments))

    _NEWOBJ = _REDUCE

    def _NEWOBJ_EX(self, _):
        self._pop()
        self._REDUCE(None)

    def _OBJ(self, _):
        function, *arguments = self._items()
        self._stack.append(self._call(function, tuple(arguments)))

    def _INST(self, argument):
        arguments = tuple(self._items())
        self._stack.append(self._call(Global(*argument.split(" ", 1)), arguments))

    def _BUILD(self, _):
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, (_Array, _Dtype)):
            target.set_state(state)

    def _BINPERSID(self, _):
        pid = self._pop()
        self._stack.append(self.persistent(pid) if self.persistent else Opaque())

    def _PERSID(self, argument):
        self._stack.append(Opaque())

    def _call(self, function: Any, arguments: Any) -> Any:
        known = _FUNCTIONS.get(function) if isinstance(function, Global) else None
        if known is None or not isinstance(arguments, tuple):
            return Opaque(function)
        for value in arguments:
            if isinstance(value, (list, dict, str, bytes, bytearray)):
                self.budget -= len(value)
        if self.budget < 0:
            raise FormatError("it copies the same values again and again")
        return known(*arguments)


def _finished(value: Any) -> Any:
    """A value as others see it: arrays instead of the instructions for building them."""
    return value.value if isinstance(value, _Array) else value


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise FormatError("an unknown encoding of bytes")
    return text.encode(encoding)


def _rebuild_tensor(storage, offset, size, stride, *_) -> Optional[torch.Tensor]:
    """``torch._utils._rebuild_tensor*``, with all bounds checked."""
    if storage is None:  # storages come later in the file
        return None
    if not isinstance(storage, torch.Tensor):
        raise FormatError("a tensor without storage")
    count = element_count(size)
    if len(stride) != len(size) or any(not isinstance(s, int) or s < 0 for s in stride):
        raise FormatError("a tensor with wrong strides")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else 0
    if not isinstance(offset, int) or offset < 0 or last >= max(storage.numel(), 1):
        raise FormatError("a tensor reaches beyond its storage")
    if count > max(storage.numel(), 1 << 20):
        raise FormatError("a tensor is larger than its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset if count else 0)


def _parameter(data, *_):
    return data


def _numpy_functions() -> Dict[Tuple[str, str], Callable]:
    functions = {Global("numpy", "dtype"): lambda name, *_: _Dtype(name)}
    for core in ("numpy.core", "numpy._core"):
        functions[Global(f"{core}.multiarray", "_reconstruct")] = lambda *_: _Array()
        functions[Global(f"{core}.multiarray", "scalar")] = lambda dtype, data: _array(
            _encode(data) if isinstance(data, str) else data, dtype, ()
        ).item()
        functions[Global(f"{core}.numeric", "_frombuffer")] = lambda data, dtype, shape, order: (
            _array(data, dtype, shape, order == "F")
        )
    return functions


_FUNCTIONS: Dict[Tuple[str, str], Callable] = {
    Global("collections", "OrderedDict"): collections.OrderedDict,
    Global("collections", "Counter"): collections.Counter,
    Global("_codecs", "encode"): _encode,
    Global("builtins", "bytes"): lambda data=b"": bytes(memoryview(data)),
    Global("__builtin__", "bytes"): lambda data=b"": bytes(memoryview(data)),
    Global("builtins", "set"): set,
    Global("__builtin__", "set"): set,
    # An integer here would ask for so many zeros, which memoryview() refuses.
    Global("builtins", "bytearray"): lambda data=b"", *_: bytearray(memoryview(data)),
    Global("torch", "Size"): lambda sizes=(): tuple(sizes),
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    **_numpy_functions(),
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


def load_pickle(data: memoryview) -> Any:
    """The value of a pickle; see :class:`PickleReader` for what becomes of objects."""
    return PickleReader(budget=len(data)).read(io.BytesIO(data))
