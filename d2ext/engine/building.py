"""Objects of a config: what goes wrong while they are built is one line that names the key."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2ext.config.overrides import lazy_keys
from d2ext.config.values import kind_of
from d2ext.errors import UserError

from detectron2.config import instantiate
from detectron2.utils.registry import locate

_TARGET = "_target_"


@contextlib.contextmanager
def building(
    what: str, settings: Callable[[], Mapping[str, Any]], done: str = "built"
) -> Iterator[None]:
    """Turn whatever a constructor or a first call raises in a `with` block into a `UserError`;
    numbers that are not finite and a lack of memory say enough.

    Args:
        what: is built, for the message.
        settings: gives the keys and values of the config, to find the key of an unknown name.
        done: what is done with it, for the message.
    """
    try:
        yield
    except (UserError, FloatingPointError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except OmegaConfBaseException as error:
        raise config_fault(error, what) from error
    except Exception as error:  # of anyone's class
        named = _keys_with(error.args[0], settings()) if isinstance(error, KeyError) else []
        if named:
            text = f"{' and '.join(named)}: no such name as {error.args[0]!r}"
            raise UserError(f"{what} cannot be {done}: {text}") from error
        reason = " ".join(str(error).split()) or (
            traceback.extract_tb(error.__traceback__)[-1].line or ""
        )
        near = _near(reason, settings(), by_key=done == "built")
        near = "".join(f"; see {key} = {value}" for key, value in near)
        raise UserError(
            f"{what} cannot be {done} with these settings: {type(error).__name__}: {reason}{near} "
            "(D2EXT_TRACEBACK=1 shows where)"
        ) from error


def config_fault(error: OmegaConfBaseException, what: str = "") -> UserError:
    """What omegaconf could not resolve or convert in a lazy config, with its key."""
    key = getattr(error, "full_key", None) or what
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"lazy config, '{key}': {reason}")


def select(cfg: Any, key: str) -> Any:
    """The value of a key of a lazy config, plain; `None` if there is none.

    Raises:
        UserError: it refers to something that is not there.
    """
    try:
        value = OmegaConf.select(cfg, key) if key else None
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise config_fault(error, key) from error


def read_field(cfg: Any, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """The value of a key of a lazy config; where there is none, or `null`, the default.

    Raises:
        UserError: there is neither, or the value is of another kind.
    """
    value = select(cfg, key)
    value = default if value is None else value
    if value is None:
        raise UserError(
            f"the lazy config has no {key}; take what a run needs from configs/common/train.py "
            "and configs/common/data"
        )
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(kind_of(k()) for k in kinds)
        raise UserError(f"lazy config, '{key}' is {value!r}; it has to be {wanted}")
    return value


def build_lazy(node: Any, key: str) -> Any:
    """`instantiate` for a part of a lazy config.

    Raises:
        UserError: it is not there, a `_target_` cannot be imported, a reference leads nowhere, or
            a constructor refuses its arguments.
    """
    if not OmegaConf.is_dict(node):
        raise UserError(f"lazy config: '{key}' is {node}, not a part that can be built")
    with building(f"'{key}' of the lazy config", lambda: lazy_settings(node, key)):
        _check_targets(node, key)
        return instantiate(node)


def _check_targets(node: Any, key: str) -> None:
    for name in range(len(node)) if OmegaConf.is_list(node) else node:
        child = node[name]
        if name == _TARGET:
            _check_target(child, f"{key}.{name}")
        elif OmegaConf.is_config(child):
            _check_targets(child, f"{key}.{name}")


def _check_target(target: Any, key: str) -> None:
    if callable(target):
        return
    try:
        known = callable(locate(target)) if isinstance(target, str) else False
    except Exception as error:  # an import may fail in any way
        reason = " ".join(str(error).split())
        raise UserError(f"lazy config, '{key}': {reason}") from error
    if not known:
        raise UserError(f"lazy config, '{key}': {target!r} is no class or function")


def lazy_settings(node: Any, key: str) -> dict[str, Any]:
    """Keys and values of a part of a lazy config."""
    names = dict.fromkeys(re.sub(r"(\.\d+)+$", "", name) for name in lazy_keys(node))  # whole lists
    return {f"{key}.{name}": OmegaConf.select(node, name) for name in names}


def _keys_with(name: Any, settings: Mapping[str, Any]) -> list[str]:
    """Keys whose value is a name, or a list that has it."""
    if not isinstance(name, (str, int)) or not name:
        return []
    lists = {
        key: value if isinstance(value, (list, tuple)) or OmegaConf.is_list(value) else [value]
        for key, value in settings.items()
    }
    return [key for key, values in lists.items() if name in list(values)][:3]


def _near(reason: str, settings: Mapping[str, Any], by_key: bool) -> list[tuple[str, Any]]:
    """Settings that a message speaks of: their value is a word of it, or `by_key` their name, which
    are arguments where something is built."""
    words = set(re.findall(r"\w+", reason))
    found = [(key, value) for key, value in settings.items() if isinstance(value, str)]
    found = [(key, value) for key, value in found if value in words]
    if not found and by_key:
        leaves = {key: key.rpartition(".")[2].lower() for key in settings}
        found = [(key, settings[key]) for key, leaf in leaves.items() if leaf in words]
    return found[:2]
