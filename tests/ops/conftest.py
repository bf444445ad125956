"""Shared by the operator tests: every implementation at hand, vectors, random inputs."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from d2ext.ops import has_native
from d2ext.ops.reference import joint_head, mask_ops, ps_roi, roi_warp

torch.set_num_threads(int(os.environ.get("D2EXT_TEST_THREADS", "1")))
VECTORS = Path(__file__).resolve().parents[1] / "vectors"
NAMES = {
    roi_warp: ["roi_warp", "roi_warp_backward", "roi_warp_max_pool", "roi_warp_max_pool_backward"],
    ps_roi: [
        "ps_roi_assemble", "ps_roi_assemble_backward", "ps_roi_mean", "ps_roi_mean_backward",
    ],
    joint_head: ["fcis_joint_head", "fcis_joint_head_backward"],
    mask_ops: [
        "mask_resize", "mask_resize_backward", "mask_gate", "mask_gate_backward", "paste_masks",
        "mask_vote",
    ],
}  # fmt: skip
REFERENCE = SimpleNamespace(
    **{name: getattr(module, name) for module, names in NAMES.items() for name in names}
)
DISPATCHED = SimpleNamespace(
    **{name: getattr(torch.ops.d2ext, name) for names in NAMES.values() for name in names}
)


@pytest.fixture(params=["dispatched", "reference"] if has_native() else ["dispatched"])
def impl(request):
    """The operators by name: as the dispatcher runs them, and the PyTorch implementations."""
    return DISPATCHED if request.param == "dispatched" else REFERENCE


@pytest.fixture
def reference():
    return REFERENCE


@pytest.fixture
def ops():
    """The operators as the dispatcher runs them."""
    return DISPATCHED


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
    """``make_rois(n, batch, height, width)``: boxes in pixels, most of them inside the image."""

    def make(count, batch, height, width, dtype=torch.float32, margin=0.1):
        size = torch.tensor([width, height, width, height], dtype=torch.float64)
        corners = torch.rand(count, 4, generator=generator, dtype=torch.float64)
        low = torch.minimum(corners[:, :2], corners[:, 2:])
        high = torch.maximum(corners[:, :2], corners[:, 2:])
        boxes = (torch.cat([low, high], 1) * (1 + 2 * margin) - margin) * size
        image = torch.randint(batch, (count, 1), generator=generator).double()
        return torch.cat([image, boxes], 1).to(dtype)

    return make


@pytest.fixture
def relative_error():
    """Norm of the difference over the norm of the oracle, both in float64."""

    def error(value, oracle):
        value, oracle = value.double(), oracle.double()
        assert value.shape == oracle.shape
        return float((value - oracle).norm() / oracle.norm().clamp(min=1e-300))

    return error
