"""dev/check_cuda.sh: a rehearsal with the emulated kernels in the place of a GPU goes through."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)
def test_a_rehearsal_without_a_gpu_and_without_detectron2_goes_through(clean_python):
    command = ["dev/check_cuda.sh", "--emulated", "--python", clean_python]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-1000:]
    assert process.stdout.splitlines()[-1] == "check_cuda: passed"
    assert "skipped" not in process.stdout and "roi_warp_backward" in process.stdout
    report = (ROOT / "build/cuda/ops_emulated.md").read_text()
    assert "detectron2 is not installed" in report
    assert "emulating a GPU" in report and "extension: native" in report
    assert "| roi_warp |" in report and "nan" not in report


def test_an_unknown_argument_is_named():
    process = subprocess.run(
        ["dev/check_cuda.sh", "--emulate"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2 and "unknown argument --emulate" in process.stderr
