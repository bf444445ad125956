"""How long the soak tests are: short within `make test`, long by `make soak`, which sets SOAK=full
and collects the counts in the folder that SOAK_OUTPUT names."""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch

FULL = os.environ.get("SOAK") == "full"
PAGE = Path(__file__).resolve().parents[2] / "docs/errors.md"


@pytest.fixture
def counted(request):
    """Function: print the counts of a test, a dict, and keep them for `docs/reliability.md`."""

    def count(counts):
        name = request.node.name.removeprefix("test_")
        print(f"\n{name}: {json.dumps(counts)}")
        if folder := os.environ.get("SOAK_OUTPUT"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = "".join(x if x.isalnum() else "_" for x in name)
            (Path(folder) / f"{file}.json").write_text(json.dumps({"test": name, **counts}))

    return count


@cache
def shown():
    """(area, what) -> message, of docs/errors.md."""
    found, area = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            area = line.removeprefix("## ")
        elif match := re.fullmatch(r"\| (.*?) \| (`+)(.*)\2 \|", line):
            found[area, match[1]] = match[3].replace("\\|", "|")
    return found


@pytest.fixture
def message():
    """Function: compare what a mistake ended in with docs/errors.md, which
    `dev/write_errors.py` writes; nothing while it does, or where a GPU changes messages."""

    def compare(area, what, observed):
        if os.environ.get("SOAK_OUTPUT"):
            return
        text = re.sub(r"^exit \d: ", "", observed)
        if not torch.cuda.is_available():
            assert shown().get((area, what)) == text, "run python dev/write_errors.py"

    return compare
