"""The config inside a checkpoint: a text that somebody else may have written. It is read as data,
and a model is built from it only of parts that belong to networks.

A yaml config chooses among registered names. A lazy one names in `_target_` what is called: here
only classes and functions of the modules in `_PARTS`, of `torch.nn` and of installed projects, and
only where a model or a change of test images is described; all others are left out.
"""

import dataclasses
import functools
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2ext.config.load import LAZY_NODES, load_config
from d2ext.config.overrides import apply_to_lazy, parse_overrides
from d2ext.config.projects import load_projects, with_present_names
from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.utils.registry import locate

_PARTS = (
    "detectron2.modeling.",
    "detectron2.layers.",
    "detectron2.structures.",
    "detectron2.data.transforms.",
    "d2ext.modeling.",
    "d2ext.ops.",
    "torch.nn.",
)
_REFUSED = "detectron2.modeling.mmdet_wrapper"  # calls whatever its arguments name
_BUILT = ("model", "dataloader.test.mapper.augmentations")
_MOST = 100_000  # settings, so that a text that repeats itself costs no memory
_TAG = "tag:yaml.org,2002:python/"
_PYTHON = "!!python/"
_NAME = f"{_PYTHON}name:"


class _DataLoader(yaml.SafeLoader):
    """Plain values, tuples as lists, and the names of what else there is, as texts."""


_DataLoader.add_multi_constructor(_TAG, lambda loader, kind, node: _PYTHON + kind)
_DataLoader.add_constructor(f"{_TAG}tuple", _DataLoader.construct_sequence)


def load_stored_config(
    text: str, source: str, overrides: Sequence[str] = ()
) -> CfgNode | DictConfig:
    """The config that a checkpoint holds, ready to build a model from it.

    Args:
        text: the config, as a run leaves it in `config.yaml`.
        source: name of the checkpoint, for messages.
        overrides: `key=value` strings.

    Raises:
        UserError: it is no config, uses a project that is not installed, or asks for something that
            is no part of a network.
    """
    content = _parse(text, source)
    if is_lazy_content(content):
        load_projects()
        absent = LAZY_NODES - set(content)
        if absent:
            raise UserError(f"the config inside '{source}' lacks {', '.join(sorted(absent))}")
        cfg = OmegaConf.create(_of_networks(content, "", source), flags={"allow_objects": True})
        OmegaConf.set_struct(cfg, False)
        apply_to_lazy(cfg, parse_overrides(overrides))
        return cfg
    if "_BASE_" in content:
        raise UserError(f"the config inside '{source}' has a _BASE_, which is another file")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        try:
            return load_config(path, overrides)
        except UserError as error:
            reason = str(error).replace(f"config file '{path}'", f"the config inside '{source}'")
            raise UserError(f"{reason}; a project that it needs may not be installed") from error


def flat_settings(text: str, source: str) -> dict[str, Any]:
    """Every setting of a config by its dotted key, references resolved, names of classes as texts;
    positions in lists of groups are part of the key.

    Args:
        text: of either kind, as a run leaves it in `config.yaml`.

    Raises:
        UserError: it is no config.
    """
    content = _parse(text, source)
    if is_lazy_content(content):
        try:
            content = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
        except OmegaConfBaseException as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"the config inside '{source}' cannot be read: {reason}") from error
    return dict(_leaves(content))


def is_lazy_content(content: dict[str, Any]) -> bool:
    """Whether the groups of a config are those of a lazy one."""
    return {"model", "train"} <= set(content)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = yaml.load(with_present_names(text), Loader=_DataLoader)
        if any(number > _MOST for number, _ in enumerate(_nodes(content))):
            raise ValueError("it has too many settings")
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())[:160]
        raise UserError(f"the config inside '{source}' cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"the config inside '{source}' is not a list of 'key: value' lines")
    return content


def _nodes(node: Any) -> Iterator[Any]:
    """A node and all below it; one that several refer to is met as often."""
    yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list)):
            yield from _nodes(child)
        else:
            yield child


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below a group, or a list of groups."""
    if isinstance(node, list) and any(isinstance(x, dict) for x in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        yield key, node
        return
    for name, value in node.items():
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


def _of_networks(node: Any, key: str, source: str) -> Any:
    """The content of a lazy config in which nothing but parts of networks can be called."""
    built = any(key == x or key.startswith(f"{x}.") for x in _BUILT)
    if isinstance(node, dict):
        if not built:
            node = {name: value for name, value in node.items() if name != "_target_"}
        elif "_target_" in node:
            target = _part(node["_target_"], source)
            # By its name: omegaconf would make a group of its fields.
            if not dataclasses.is_dataclass(target):
                node = {**node, "_target_": target}
        return {
            name: value
            if name == "_target_"
            else _of_networks(value, f"{key}.{name}" if key else str(name), source)
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [_of_networks(value, f"{key}.{i}", source) for i, value in enumerate(node)]
    if built and isinstance(node, str) and node.startswith(_PYTHON):
        return _part(node, source)
    return node


def _part(name: Any, source: str) -> Any:
    """The class or function of a name.

    Raises:
        UserError: it is no part of a network, or not there.
    """
    found, name = None, str(name).removeprefix(_NAME)
    if _is_allowed(name):
        try:
            found = locate(name)
        except Exception:  # whatever comes up in an import
            found = None
        if found is None:
            raise UserError(f"the config inside '{source}' uses '{name[:80]}', which is not there")
    # Names may lead through a module into another one that it imports.
    owner = f"{getattr(found, '__module__', '')}."
    if not callable(found) or not _is_allowed(owner) or "._" in owner:
        raise UserError(
            f"the config inside '{source}' calls '{name[:80]}', which is no part of a network "
            "that d2ext knows; if you trust it, give --config-file"
        )
    return found


def _is_allowed(name: str) -> bool:
    return name.startswith((*_PARTS, *_projects())) and not name.startswith(_REFUSED)


@functools.cache
def _projects() -> tuple[str, ...]:
    loaded = load_projects()
    entries = importlib.metadata.entry_points(group="d2ext.projects")
    return tuple(f"{entry.module}." for entry in entries if entry.name in loaded)
