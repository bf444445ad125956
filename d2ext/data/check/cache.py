"""Results of slow checks that found no error, kept on disk under the state of the files they were
computed from. An error is never kept: it is looked for again until it is gone.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

VERSION = 2  # of the checks: raise it when they find other things
SLOW = 1.0  # seconds; results that took less are not worth a file
_FILES = 100


def cache_folder() -> str:
    """`d2ext/data_check` in the user's cache folder ($XDG_CACHE_HOME, else `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "d2ext", "data_check")


def fingerprint(paths: Sequence[str]) -> list[list]:
    """Absolute path, size and time of change of each file; of a folder those of all files in it,
    as one hash. A missing one counts as such."""
    return [[os.path.abspath(path), *_state(path)] for path in paths]


def _state(path):
    try:
        path = PathManager.get_local_path(path)
        if os.path.isdir(path):
            return _listing(path)
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return 0, 0


def _listing(folder):
    """Number of files and a hash of their names, sizes and times; sub-folders do not count."""
    lines = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_file():
                    stat = entry.stat()
                    lines.append(f"{entry.name!r} {stat.st_size} {stat.st_mtime_ns}\n")
            except OSError:
                lines.append(f"{entry.name!r} missing\n")
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode("utf-8", "surrogateescape"))
    return len(lines), digest.hexdigest()


def _file(key: Any) -> str:
    text = json.dumps([VERSION, key], sort_keys=True)
    return os.path.join(cache_folder(), hashlib.sha256(text.encode()).hexdigest() + ".json")


def load(key: Any) -> Any | None:
    """What was stored under a key (anything that JSON can hold), or None."""
    try:
        with open(_file(key), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def store(key: Any, value: Any) -> None:
    """Keep a value. A folder that cannot be written to only costs time at the next start."""
    path = _file(key)
    partial = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "w", encoding="utf-8") as f:
            json.dump(value, f)
        os.replace(partial, path)
        _remove_old(os.path.dirname(path))
    except OSError as e:
        logger.info("The result of the data check could not be kept: %s", e)


def _remove_old(folder: str) -> None:
    files = [entry for entry in os.scandir(folder) if entry.name.endswith(".json")]
    files.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    for entry in files[_FILES:]:
        os.unlink(entry.path)
