"""Fixtures of the demo's tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def walkthrough_importable():
    """Scripts in demo/ import their package `walkthrough` because it lies beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "demo")
        yield
