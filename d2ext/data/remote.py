"""Data at an address such as `s3://bucket/mydata`, or any other that fsspec reads: a copy on this
machine."""

import fcntl
import hashlib
import json
import os
import posixpath
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from d2ext.errors import UserError

_AT_ONCE = 64  # files of one request to fsspec, which fetches them side by side
# What changes with the content of a file, by whatever name a storage has it.
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created")
_INDEX = "index.json"


def is_address(place: str) -> bool:
    """Whether a place is an address rather than a path."""
    return "://" in place


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
        UserError: the package for this kind of address is not installed, or there is none.
    """
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        kind = address.partition("://")[0]
        reason = " ".join(str(error).split())
        raise UserError(
            f"{address}: addresses of the kind {kind} need another package ({reason}); "
            "for http and https: pip install 'fsspec[http]', for s3: pip install s3fs"
        ) from error
    except Exception as error:
        raise UserError(f"{address} cannot be reached: {_reason(error)}") from error


def cache_folder() -> Path:
    """`$D2EXT_CACHE`, else `$XDG_CACHE_HOME/d2ext`, else `~/.cache/d2ext`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("D2EXT_CACHE") or os.path.join(base, "d2ext")) / "data"


def local_path(path: str) -> str:
    """A path as it is, or that of the local copy of a file or folder at an address.

    The copy is made, or brought up to date, first: files that are new or have another size or
    version are fetched, those that are gone are removed. Processes of one machine wait for the one
    that does it. What was fetched stays when this is interrupted.

    Raises:
        UserError: nothing can be read there, or nothing written here.
    """
    if not is_address(path):
        return path
    storage, root = file_system(path)
    try:
        known: dict[str, dict[str, Any]] = storage.find(root, detail=True)
    except Exception as error:  # of any library that fsspec uses
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    if not known:
        raise UserError(f"{path}: there is no such file or folder, or nothing is in it")
    folder = cache_folder() / hashlib.sha256(path.encode()).hexdigest()[:16]
    # A single file keeps its name: what it holds is told by its ending.
    names = {
        file: posixpath.relpath(file, root) if file != root else posixpath.basename(root)
        for file in known
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w", encoding="utf-8") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # until the file is closed
            _update(storage, known, names, folder, path)
    except OSError as error:
        raise UserError(f"cannot copy {path} to {folder}: {_reason(error)}") from error
    content = folder / "content"
    return str(content / names[root] if root in names else content)


def _update(storage, known: dict, names: dict[str, str], folder: Path, path: str) -> None:
    index = folder / _INDEX
    try:
        have = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        have = {}
    wanted = {names[file]: _version(details) for file, details in known.items()}
    content = folder / "content"
    for name in have.keys() - wanted.keys():
        (content / name).unlink(missing_ok=True)
    have = {n: v for n, v in have.items() if wanted.get(n) == v and (content / n).is_file()}
    missing = [file for file in known if names[file] not in have]
    with tqdm(total=len(missing), desc=f"fetching {path}", disable=not missing) as bar:
        for first in range(0, len(missing), _AT_ONCE):
            files = missing[first : first + _AT_ONCE]
            _fetch(storage, files, [content / names[file] for file in files], path)
            have |= {names[file]: wanted[names[file]] for file in files}
            _write_index(index, have)
            bar.update(len(files))
    _write_index(index, have)


def _fetch(storage, files: list[str], targets: list[Path], path: str) -> None:
    """Files under other names first, so that no half of one is ever taken for the whole."""
    partial = [target.with_name(f"{target.name}.part") for target in targets]
    for target in partial:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage.get(files, list(map(str, partial)))
    except Exception as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    for source, target in zip(partial, targets):
        os.replace(source, target)


def _version(details: dict[str, Any]) -> list:
    found = [str(details[key]) for key in _VERSIONS if details.get(key) is not None]
    return [details.get("size"), *found]


def _write_index(index: Path, have: dict) -> None:
    partial = index.with_name(f"{index.name}.part")
    partial.write_text(json.dumps(have), encoding="utf-8")
    os.replace(partial, index)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
