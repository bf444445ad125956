"""How projects reach the shared package without being named in it.

A project package calls :func:`register_config` when it is imported and declares itself under the
entry point group ``d2ext.projects``; :func:`load_projects` imports whatever is declared, so that
every tool understands the configs of every installed project.
"""

import functools
import importlib.metadata
import logging
from typing import Callable, List

from detectron2.config import CfgNode

ConfigFunction = Callable[[CfgNode], None]

_CONFIG_FUNCTIONS: List[ConfigFunction] = []


def register_config(function: ConfigFunction) -> ConfigFunction:
    """Add ``function(cfg)`` to those that extend detectron2's yaml keys; usable as a decorator."""
    if function not in _CONFIG_FUNCTIONS:
        _CONFIG_FUNCTIONS.append(function)
    return function


def config_functions() -> List[ConfigFunction]:
    """Those registered so far, in order."""
    return list(_CONFIG_FUNCTIONS)


@functools.cache
def load_projects() -> tuple:
    """Import every installed project once. Returns the names of those that could be imported."""
    loaded = []
    for entry in importlib.metadata.entry_points(group="d2ext.projects"):
        try:
            entry.load()
        except ImportError as error:
            logging.getLogger(__name__).warning(
                "project %s is declared but cannot be imported (%s); run `make install` again",
                entry.name,
                error,
            )
        else:
            loaded.append(entry.name)
    return tuple(loaded)
