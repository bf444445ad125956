"""Reads pickles of arrays and plain values, such as detectron2's `.pkl`, and looks through those
in files of torch before torch reads them.

A pickle is a program. Here it gets inert stand-ins for whatever it asks for, so that nothing of a
file runs. Nor may it misuse what the standard library does by itself: a tuple of tuples as a key,
once hashed, takes forever or overflows the stack, so keys are text or numbers; and no number asks
for memory that the file does not fill.
"""

import mmap
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from d2ext.checkpoint.formats.common import FormatError
from d2ext.checkpoint.formats.stand_ins import (
    FUNCTIONS,
    Array,
    Dtype,
    Opaque,
    checked,
    hides_methods,
    stand_in,
)

_MOST_NAMES = 1000
_SIZED = (str, bytes, bytearray, list, tuple, dict, set)
_ITEM_SIZES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
_ITEM_SIZES.update({"Char": 1, "Byte": 1, "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16})


class Unpickler(pickle._Unpickler):
    """The standard library's reader in Python, which checks keys before they are hashed.

    Args:
        stream: a binary file, left behind the last instruction.
        size: number of bytes of the file, which bounds what is copied.

    Attributes:
        classes: {name: stand-in} of what the pickle asks for.
        storages: {key: number of bytes} of torch.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: BinaryIO, size: int):
        super().__init__(stream, encoding="latin1")
        self.classes: dict[str, type] = {}
        self.storages: dict[str, int] = {}
        self._budget = 4 * size + (1 << 20)

    def load(self) -> Any:
        try:
            return super().load()
        except FormatError:
            raise
        except Exception as error:  # whatever an instruction makes of values it is not for
            raise FormatError(f"a pickle in it is damaged ({type(error).__name__})") from error

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        source = f"{module}.{name}"
        if source in FUNCTIONS:
            return FUNCTIONS[source]
        if source not in self.classes:
            self.classes[source] = stand_in(source)
            if len(self.classes) > _MOST_NAMES:
                raise FormatError(f"it asks for more than {_MOST_NAMES} classes")
        return self.classes[source]

    def persistent_load(self, pid: Any) -> Opaque:
        """Note a storage of torch."""
        tag, kind, key, place, count, *view = pid
        if not isinstance(pid, tuple) or tag != "storage" or not isinstance(kind, type):
            raise FormatError("a reference to something that is no storage")
        name = getattr(kind, "source", "").removeprefix("torch.").removesuffix("Storage")
        if name not in _ITEM_SIZES:
            raise FormatError(f"a storage of the unknown type '{name[:60]}'")
        parts = view[0] if view and isinstance(view[0], tuple) else view
        types = [type(x) for x in (key, place, count, *parts)]
        if types[:3] != [str, str, int] or not set(types) <= {str, int, type(None)}:
            raise FormatError("a storage is not described by texts and numbers")
        self.storages[key] = count * _ITEM_SIZES[name]
        return Opaque()

    def _charge(self, values: Any) -> None:
        if isinstance(values, tuple):
            self._budget -= len(values) + sum(len(x) for x in values if isinstance(x, _SIZED))
        if self._budget < 0:
            raise FormatError("it copies the same values again and again")

    def _check_entries(self, target: Any, keys: list[Any]) -> None:
        if not isinstance(target, (dict, Opaque)):
            raise FormatError(f"entries for a {type(target).__name__}")
        checked(keys)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self._charge(state)
        if isinstance(target, (Opaque, Dtype, Array)):
            target.__setstate__(state)
        elif type(target) is not OrderedDict or hides_methods(state):
            raise FormatError("it changes something that is no object, or its methods")

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))


def _after(check: Callable, load: Callable) -> Callable:
    """An instruction that follows a check of the values it works on."""

    def checked_load(self: Unpickler) -> None:
        check(self)
        load(self)

    return checked_load


_CHECKS = {
    "REDUCE": lambda self: self._charge(self.stack[-1]),
    "NEWOBJ": lambda self: self._charge(self.stack[-1]),
    "NEWOBJ_EX": lambda self: self._charge(self.stack[-2]),
    "SETITEM": lambda self: self._check_entries(self.stack[-3], self.stack[-2:-1]),
    "SETITEMS": lambda self: self._check_entries(self.metastack[-1][-1], self.stack[::2]),
    "DICT": lambda self: checked(self.stack[::2]),
    "ADDITEMS": lambda self: checked(self.stack),
    "FROZENSET": lambda self: checked(self.stack),
}
for _name, _check in _CHECKS.items():
    _code = getattr(pickle, _name)[0]
    Unpickler.dispatch[_code] = _after(_check, Unpickler.dispatch[_code])
Unpickler.dispatch[pickle.BUILD[0]] = Unpickler.load_build
Unpickler.dispatch[pickle.BYTEARRAY8[0]] = Unpickler.load_bytearray8


def read_pickle(path: str, data: mmap.mmap) -> Any:
    """The value of a pickle, with an `Opaque` for each object."""
    return Unpickler(data, len(data)).load()
