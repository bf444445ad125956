"""The CUDA kernels without a GPU: compiled as C++ for an emulation of its threads, which sees every
access to memory, they pass the tests of the operators. `make emulate` runs all of these."""

import shutil
import sys

import pytest

from tests.ops.emulation.build import COMPILER, ROOT, folder
from tests.ops.emulation.run import run_tests

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER[0]) is None,
    reason="needs g++ on Linux",
)
_VOTE = """
import torch
from d2ext import ops
assert ops.has_native()
boxes = torch.tensor([[1.0, 2, 9, 8], [3, 1, 12, 9], [0, 0, 5, 5]])
index, offset = torch.tensor([0, 1, 2]).int(), torch.tensor([0, 2, 3]).int()
try:
    torch.ops.d2ext.mask_vote(torch.rand(3, 7, 7), boxes, index, offset, torch.ones(3), 12, 14)
except RuntimeError as error:
    print(str(error).splitlines()[0])
print(torch.ops.d2ext_emulation.launches(), "launches")
"""


@pytest.fixture(scope="module")
def emulated():
    """Folder of the extension; compiling takes two minutes, once."""
    return folder()


@pytest.mark.parametrize(
    "order, files",
    [
        (0, ["test_vectors_mnc.py", "test_vectors_fcis.py", "test_poolers.py"]),
        (1, ["test_vectors_mnc.py", "test_vectors_fcis.py", "test_roi_warp_rules.py"]),
        (2, ["test_ps_roi.py", "test_mask_ops.py"]),
    ],
)
def test_the_emulated_kernels_pass_the_tests_of_the_operators(emulated, order, files):
    process = run_tests(emulated, [f"tests/ops/{file}" for file in files], order)
    assert process.returncode == 0, process.stdout[-4000:]
    assert "100%" in process.stdout and "cannot be loaded" not in process.stdout


def test_no_test_falls_back_to_the_pytorch_implementations(tmp_path):
    for file in (ROOT / "d2ext").rglob("*.py"):
        place = tmp_path / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    (tmp_path / "d2ext/_C.abi3.so").write_text("half a library")
    process = run_tests(tmp_path, ["tests/ops/test_mask_resize.py", "-x"])
    assert process.returncode == 1 and "cannot be loaded: " in process.stdout
    assert process.stdout.startswith("E") and "ERROR tests/ops/test_mask" in process.stdout


def test_building_again_writes_nothing(emulated):
    files = [path for path in emulated.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    folder()
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert emulated / "d2ext/_C.abi3.so" in before


def test_the_emulated_kernels_are_the_ones_that_run(emulated, run_python):
    process = run_python("-W", "ignore", "-c", _VOTE, path=[emulated])
    assert process.stdout == "4 launches\n", process.stderr


@pytest.mark.parametrize(
    "name, before, after, words",
    [
        ("no_barrier", "__syncthreads();", ";", "two threads touch one byte with no barrier"),
        (
            "too_far",
            "out_boxes[result * 4",
            "out_boxes[result * 4 + (1 << 20)",
            "a write of 4 byte",
        ),
        ("no_guard", "const c10::cuda::CUDAGuard guard", "// guard", "no device guard"),
    ],
)
def test_a_planted_mistake_is_found(run_python, name, before, after, words):
    def change(file, source):
        assert file != "mask_vote.cu" or before in source
        return source.replace(before, after) if file == "mask_vote.cu" else source

    process = run_python("-W", "ignore", "-c", _VOTE, path=[folder(change, name)])
    assert words in process.stdout, process.stdout + process.stderr
