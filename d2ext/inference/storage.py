"""Files here and at addresses such as s3://bucket/folder, which fsspec reads and writes."""

import os
from typing import Any

from d2ext.data.json_files import writing
from d2ext.data.remote import file_system, is_address
from d2ext.errors import UserError

# What libraries of remote storage raise has no common class; these are mistakes of our own.
_OWN_MISTAKES = (AttributeError, NameError, AssertionError)


def open_binary(place: str) -> Any:
    """A file to read from at any position.

    Raises:
        OSError: it cannot be opened.
        UserError: see `d2ext.data.remote.file_system`.
    """
    if not is_address(place):
        return open(place, "rb")
    system, path = file_system(place)
    return system.open(path, "rb")


def read_bytes(place: str, span: tuple[int, int] | None = None) -> bytes:
    """The content of a file.

    Args:
        place: path or address.
        span: first byte and number of bytes; default: all.

    Raises:
        UserError: it cannot be read, or ends before the span does.
    """
    start, count = span or (0, None)
    try:
        if is_address(place):
            system, path = file_system(place)
            content = system.cat_file(path, start, None if count is None else start + count)
        else:
            with open(place, "rb") as f:
                f.seek(start)
                content = f.read() if count is None else f.read(count)
    except UserError:
        raise
    except _OWN_MISTAKES:
        raise
    except Exception as error:
        raise UserError(f"{place} cannot be read: {_reason(error)}") from error
    if count is not None and len(content) != count:
        raise UserError(f"{place} ends too early: {len(content)} of {count} bytes at {start}")
    return content


def write_bytes(place: str, content: bytes) -> None:
    """Write a file that is either complete or not there, also with several writers, and also if
    the machine stops at any moment.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if is_address(place):
            system, path = file_system(place)
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.pipe_file(path, content)  # one object, which appears when it is complete
            return
        with writing(place, "wb") as f:
            f.write(content)
    except (UserError, *_OWN_MISTAKES):
        raise
    except Exception as error:
        raise UserError(f"cannot write {place}: {_reason(error)}") from error


def list_folder(place: str) -> list[str]:
    """Names in a folder, in order; none if it does not exist.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if is_address(place):
            system, path = file_system(place)
            system.invalidate_cache()
            found = system.ls(path, detail=False)
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)
        return sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    except (UserError, *_OWN_MISTAKES):
        raise
    except Exception as error:
        raise UserError(f"folder {place} cannot be read: {_reason(error)}") from error


def place_below(folder: str, *names: str) -> str:
    """A place below a folder."""
    if is_address(folder):
        return "/".join([folder.rstrip("/"), *names])
    return os.path.join(folder, *names)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
