"""From the text of an override to a value, in the type of the setting that it replaces."""

import ast
import os
import re
from collections.abc import Iterable
from typing import Any

import yaml
from omegaconf import OmegaConf

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_LITERALS = (bool, int, float, str, list, tuple, dict, type(None))


def parse_value(text: str) -> Any:
    """The value that `text` stands for by itself.

    A Python literal, `true`, `false`, `null`, a list of unquoted words such as `[a, b]`, or
    else the text.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return _parse_words(text)
    return value if isinstance(value, _LITERALS) else text


def _parse_words(text: str) -> Any:
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return text
    flow = f"[{text[1:-1]}]" if text.startswith("(") else text
    try:
        return _parse_leaves(yaml.load(flow, yaml.BaseLoader))  # BaseLoader: every leaf is text
    except yaml.YAMLError:
        return text


def _parse_leaves(value: Any) -> Any:
    if isinstance(value, list):
        return [_parse_leaves(v) for v in value]
    if isinstance(value, dict):
        return {k: _parse_leaves(v) for k, v in value.items()}
    return parse_value(value)


def kind_of(old: Any) -> str:
    """What a setting that holds `old` takes, in words."""
    if isinstance(old, dict) or OmegaConf.is_dict(old):
        return "a group of keys"
    if isinstance(old, (list, tuple)) or OmegaConf.is_list(old):
        return "a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(old), "a value")


def convert(text: str, old: Any) -> tuple[Any, str | None]:
    """Read `text` as a value for a setting that holds `old`.

    Returns:
        (value, None), or (None, what the setting takes) if the text does not fit. Texts and
        fractional numbers may be `None`.
    """
    value = parse_value(text)
    if isinstance(old, dict) or OmegaConf.is_dict(old):
        fits = isinstance(value, dict)
    elif isinstance(old, (list, tuple)) or OmegaConf.is_list(old):
        return _convert_list(text.strip(), value, list(_leaves(old)))
    elif isinstance(old, bool):
        fits = isinstance(value, bool)
    elif isinstance(old, int):
        fits = _is_number(value) and float(value).is_integer()
        value = int(value) if fits else None  # 9e4 as well
    elif isinstance(old, float):
        fits = value is None or _is_number(value)
        value = float(value) if fits and value is not None else None
    elif isinstance(old, str):
        fits = True
        if text.strip() == "none" or not isinstance(value, (str, type(None))):
            value = text.strip()  # "none" is the name of a mode: INPUT.RANDOM_FLIP=none
        if value is not None and value.startswith("~/"):  # shells leave it in KEY=~/folder
            value = os.path.expanduser(value)
    else:  # nothing, a class, a function
        fits = True
    return (value, None) if fits else (None, kind_of(old))


def _convert_list(text: str, value: Any, leaves: list) -> tuple[Any, str | None]:
    of_text = bool(leaves) and all(isinstance(v, str) for v in leaves)
    if value is None or isinstance(value, dict):
        return None, "a list"
    if not text:
        return [], None
    if not isinstance(value, (list, tuple)):  # one entry, or names without brackets
        names = text.split(",")
        if of_text and all(re.fullmatch(r"\s*[\w.\-]+\s*", name) for name in names):
            value = [name.strip() for name in names]
        else:
            value = [text if of_text else value]
    if of_text:
        value = [v if isinstance(v, (str, list, tuple)) else str(v) for v in value]
    elif leaves and all(_is_number(v) for v in leaves):
        if not all(_is_number(v) for v in _leaves(value)):
            return None, "a list of numbers"
        if all(isinstance(v, float) for v in leaves):
            value = _to_float(value)
    return list(value), None


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)) or OmegaConf.is_list(value):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


def _to_float(value: Any) -> Any:
    return [_to_float(v) for v in value] if isinstance(value, (list, tuple)) else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
