"""Shared by the operator tests: every implementation at hand, vectors, random inputs."""

import json
import os
from pathlib import Path

import pytest
import torch

from d2ext.ops import has_native
from d2ext.ops._library import EXTENSION_STATE

from tests.ops.helpers import ops, reference

torch.set_num_threads(int(os.environ.get("D2EXT_TEST_THREADS", "1")))
VECTORS = Path(__file__).resolve().parents[1] / "vectors"


@pytest.fixture(scope="session", autouse=True)
def emulated_kernels():
    """Where tests are to run on the emulated kernels, they do, or fail: nothing falls back."""
    if "EMULATION_ORDER" in os.environ:
        assert hasattr(torch.ops.d2ext_emulation, "launches"), EXTENSION_STATE


@pytest.fixture(params=["dispatched", "reference"] if has_native() else ["dispatched"])
def impl(request):
    """The operators by name: as the dispatcher runs them, and the PyTorch implementations."""
    return ops if request.param == "dispatched" else reference


def _load(name):
    return {entry["id"]: entry for entry in json.loads((VECTORS / name).read_text())["vectors"]}


@pytest.fixture(scope="session")
def mnc_vectors():
    return _load("mnc_vectors.json")


@pytest.fixture(scope="session")
def fcis_vectors():
    return _load("fcis_vectors.json")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def make_rois(generator):
    """`make_rois(n, batch, height, width)`: boxes in pixels, most of them inside the image."""

    def make(count, batch, height, width, dtype=torch.float32, margin=0.1):
        size = torch.tensor([width, height, width, height], dtype=torch.float64)
        corners = torch.rand(count, 4, generator=generator, dtype=torch.float64)
        low = torch.minimum(corners[:, :2], corners[:, 2:])
        high = torch.maximum(corners[:, :2], corners[:, 2:])
        boxes = (torch.cat([low, high], 1) * (1 + 2 * margin) - margin) * size
        image = torch.randint(batch, (count, 1), generator=generator).double()
        return torch.cat([image, boxes], 1).to(dtype)

    return make
