#!/usr/bin/env python3
"""Write docs/errors.md: mistakes that people make, each with the line that it ends in. The tests of
the table make every mistake; this runs them and keeps what they saw.

dev/write_errors.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/errors.md"
TESTS = ("tests/soak/test_faults.py", "tests/soak/test_mistakes.py")
HEAD = """# Messages

What you did, and the line that says so. A command prints the line after `error:` on stderr, without
a traceback, and its exit status is 1, or 2 where the options cannot be understood. From Python it
is a `d2ext.errors.UserError`, for operators what PyTorch raises. `D2EXT_TRACEBACK=1` in front of a
command shows where the line comes from.

Written by `dev/write_errors.py` from tests that make each of these mistakes and compare the whole
line. Names of folders are left out; data sets are called `few`. Search the page for words of your
message.
"""


def code(message: str) -> str:
    """A message as code in a cell of a table."""
    fence = "``" if "`" in message else "`"
    return f"{fence}{message}{fence}".replace("|", "\\|")


def page(records: list[dict]) -> str:
    """Markdown of what the tests have recorded: dicts of `area`, `what`, `mistake`, `number`."""
    text = HEAD
    for area in dict.fromkeys(r["area"] for r in records):
        text += f"\n## {area}\n\n| you | the message |\n|---|---|\n"
        for r in records:
            if r["area"] == area:
                message = r["mistake"].partition(": ")[2] if "exit " in r["mistake"][:6] else ""
                text += f"| {r['what']} | {code(message or r['mistake'])} |\n"
    return text


def main() -> int:
    """Run the tests and write the page; the exit status of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOAK_OUTPUT": folder}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        records = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    records = [r for r in records if "mistake" in r]
    first, second = ([r for r in records if ("observed" in r) is known] for known in (False, True))
    records = sorted(first, key=_place) + sorted(second, key=_place)
    PAGE.write_text(page(records), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(records)} messages")
    return status


def _place(record: dict) -> int:
    return record["number"]


if __name__ == "__main__":
    sys.exit(main())
