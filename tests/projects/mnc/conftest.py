import json
from pathlib import Path

import pytest

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "mnc_vectors.json"


@pytest.fixture(scope="session")
def vectors():
    return {entry["id"]: entry for entry in json.loads(VECTORS.read_text())["vectors"]}
