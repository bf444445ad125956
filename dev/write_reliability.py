#!/usr/bin/env python3
"""Write docs/reliability.md from what `make soak` has counted.

dev/write_reliability.py FOLDER     # with the JSON files of the tests
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/reliability.md"
HEAD = """# Reliability

Written by `dev/write_reliability.py` from what the tests of `make soak` have counted. That provokes
all this anew, for an hour and more on two cores; `make test` has a short form of each. Names of
folders are left out of the messages.

## Counted

| what | counts |
|---|---|
"""
FAULTS = """
## Faults

What happens is the outcome of the command, its exit status and error line, or what was found
afterwards.

| fault | has to be | happens |
|---|---|---|
"""


def cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def page(records: list[dict]) -> str:
    """Markdown of what the tests have counted."""
    faults = sorted((r for r in records if "observed" in r), key=lambda r: r["number"])
    rows = []
    for record in sorted(
        (r for r in records if not {"observed", "mistake"} & set(r)), key=lambda r: r["test"]
    ):
        test = record.pop("test").partition("[")[0].replace("_", " ")
        counts = ", ".join(f"{cell(key)}: {cell(value)}" for key, value in record.items())
        rows.append(f"| {test} | {counts} |")
    text = HEAD + "\n".join(rows) + "\n" + FAULTS
    for area in dict.fromkeys(r["area"] for r in faults):
        text += f"| **{area}** | | |\n"
        for r in faults:
            if r["area"] == area:
                text += f"| {cell(r['what'])} | {cell(r['expected'])} | {cell(r['observed'])} |\n"
    return text


def main(folder: str) -> None:
    files = list(Path(folder).glob("*.json"))
    if not files:
        sys.exit(f"error: {folder} has no counts; run make soak")
    PAGE.write_text(page([json.loads(path.read_text()) for path in files]))
    print(f"wrote {PAGE} from {len(files)} tests")


if __name__ == "__main__":
    main(*sys.argv[1:])
