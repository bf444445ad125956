"""JSON files: reading with mistakes named by line, and writing whole files only."""

import contextlib
import json
import os
import tempfile
from typing import Any

from d2ext.errors import UserError


class _Located(dict):
    """An object that knows where it begins."""

    position = 0


class _Locating(json.JSONDecoder):
    """A decoder that gives objects their places, which the standard library's does not."""

    def __init__(self):
        super().__init__()
        self.parse_object = self._parse_object
        self.scan_once = json.scanner.py_make_scanner(self)

    def _parse_object(self, text_and_end, *arguments):
        value, end = json.decoder.JSONObject(text_and_end, *arguments)
        located = _Located(value)
        located.position = text_and_end[1] - 1
        return located, end


def read_json(path: str) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except json.JSONDecodeError as e:
        raise UserError(f"{path} line {e.lineno}: not valid JSON: {e.msg}; save it again") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from None
    except (OSError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot read {path}: {reason}") from None


class Places:
    """Where the objects in the lists of a JSON file are written; the file is read again when the
    first place is asked for.

    Args:
        path: of the file.
        section: name of the list at its top level.
    """

    def __init__(self, path: str, section: str):
        self.path, self.section = path, section
        self._lines: dict[int, int] | None = None

    def __getitem__(self, index: int) -> str:
        """Such as "a.json line 7"; "a.json: shapes[2]" for what is no object."""
        if self._lines is None:
            with open(self.path, encoding="utf-8-sig") as f:
                text = f.read()
            self._lines, line, before = {}, 1, 0
            for number, value in enumerate(_Locating().decode(text)[self.section]):
                if isinstance(value, _Located):
                    line += text.count("\n", before, value.position)
                    before = value.position
                    self._lines[number] = line
        if index not in self._lines:
            return f"{self.path}: {self.section}[{index}]"
        return f"{self.path} line {self._lines[index]}"


def write_json(data: dict, path: str) -> None:
    """Write a file that is either complete or not there, see `writing`."""
    with writing(path) as f:
        json.dump(data, f)


@contextlib.contextmanager
def writing(path: str, mode: str = "w"):
    """A file to be written in a `with` block, which takes its place at the end of it: it is either
    complete or not there, also with several writers.

    Raises:
        UserError: it cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
        encoding = None if "b" in mode else "utf-8"
        try:
            with os.fdopen(handle, mode, encoding=encoding) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
