"""How long the soak tests are: short within `make test`, long by `make soak`, which sets SOAK=full
and collects the counts in the folder that SOAK_OUTPUT names."""

import json
import os
from pathlib import Path

import pytest

FULL = os.environ.get("SOAK") == "full"


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
