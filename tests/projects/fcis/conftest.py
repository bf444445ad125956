import json
from pathlib import Path

import pytest

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "fcis_vectors.json"


@pytest.fixture(scope="session")
def vectors():
    """Numbers worked out for FCIS, by name: (inputs, expected)."""
    entries = json.loads(VECTORS.read_text())["vectors"]
    return {entry["id"]: (entry["inputs"], entry["expected"]) for entry in entries}
