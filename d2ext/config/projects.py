"""How projects reach the shared package without being named in it.

A project package, in this repository or anywhere else, calls `register_config` when it is
imported and declares itself under the entry point group `d2ext.projects`; `load_projects`
imports whatever is declared, so that every tool understands the configs of every installed project.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode

ConfigFunction = Callable[[CfgNode], None]

_GROUP = "d2ext.projects"
_CONFIG_FUNCTIONS: list[ConfigFunction] = []


def register_config(function: ConfigFunction) -> ConfigFunction:
    """Add `function(cfg)` to those that extend detectron2's yaml keys; usable as a decorator."""
    if function not in _CONFIG_FUNCTIONS:
        _CONFIG_FUNCTIONS.append(function)
    return function


def config_functions() -> list[ConfigFunction]:
    """Those registered so far, in order."""
    return list(_CONFIG_FUNCTIONS)


@functools.cache
def load_projects() -> tuple:
    """Import every installed project once. Returns the names of those that could be imported."""
    loaded = []
    for entry in importlib.metadata.entry_points(group=_GROUP):
        try:
            entry.load()
        except Exception as error:  # anyone's code; the others have to work without it
            logging.getLogger(__name__).warning(
                "project %s of the package %s cannot be imported (%s: %s); install it again, or "
                "uninstall it",
                entry.name,
                entry.dist.name if entry.dist else "?",
                type(error).__name__,
                " ".join(str(error).split()),
            )
        else:
            loaded.append(entry.name)
    return tuple(loaded)


def project_configs(name: str) -> Path | None:
    """Folder of an installed project's configs, in its package or beside it; None without one."""
    for entry in importlib.metadata.entry_points(group=_GROUP, name=name):
        file = importlib.import_module(entry.module).__file__
        if file is None:  # a folder without __init__.py
            continue
        package = Path(file).resolve().parent
        for folder in (package / "configs", package.parent / "configs"):
            if folder.is_dir():
                return folder
    return None


def with_present_names(text: str) -> str:
    """A saved lazy config, in which parts of projects are called by the names they have now.

    `htc.meta_arch` was what is `d2ext.projects.htc.meta_arch` today; other projects may move their
    package in the same way, if they keep the name of their entry point.
    """
    for entry in importlib.metadata.entry_points(group=_GROUP):
        name = entry.name
        if name != entry.module and name.isidentifier() and not importlib.util.find_spec(name):
            called = rf"(_target_: ['\"]?|!!python/name:){name}\."
            text = re.sub(called, rf"\g<1>{entry.module}.", text)
    return text
