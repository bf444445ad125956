"""Find a shipped config by its name, among the shared ones and those of installed projects."""

import os
from pathlib import Path

from d2ext.config.load import config_roots
from d2ext.config.overrides import nearest
from d2ext.config.projects import load_projects, project_configs
from d2ext.errors import UserError

_ENDINGS = ("", ".yaml", ".py")


def find_config(name: str | os.PathLike) -> str:
    """Path of a config file: of an existing one itself, else of the shipped one of that name.

    Args:
        name: a path, or a name such as `htc_tiny.py`; without an ending the yaml config is meant.

    Raises:
        UserError: there is none; names the nearest.
    """
    if os.path.isfile(name):
        return os.fspath(name)
    folders = config_folders()
    for ending in _ENDINGS:
        for folder in folders:
            if (folder / f"{name}{ending}").is_file():
                return str(folder / f"{name}{ending}")
    known = list(shipped_configs())
    raise UserError(
        f"config '{os.fspath(name)}' does not exist, neither as a file nor among the shipped ones"
        f"{nearest(str(name), known)}"
    )


def config_folders() -> list[Path]:
    """Those of the shared configs, then those of every installed project."""
    return [*config_roots(), *filter(None, map(project_configs, load_projects()))]


def shipped_configs() -> dict[str, list[Path]]:
    """Name -> files of its kinds, yaml first, folder by folder; without the bases of others."""
    found: dict[str, list[Path]] = {}
    for folder in config_folders():
        for path in sorted(folder.glob("*.yaml")) + sorted(folder.glob("*.py")):
            if not path.name.startswith(("Base", "_")):
                found.setdefault(path.stem, []).append(path)
    return found
