"""Loading of the compiled kernels: what is said where they do not fit this torch or this GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from d2ext import ops
from d2ext.ops import _library
from d2ext.ops._architectures import fits

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("9.0", (8, 0), False),
        ("9.0", (10, 0), False),  # no machine code for another major version
        ("9.0+PTX", (10, 0), True),
        ("9.0+PTX", (8, 9), False),  # PTX is not for older ones
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("7.5,8.0,9.0,10.0,11.0,12.0+PTX", (7, 0), False),
        ("7.5,8.0,9.0,10.0,11.0,12.0+PTX", (8, 9), True),
        ("7.5,8.0,9.0,10.0,11.0,12.0+PTX", (13, 0), True),
        ("8.0;9.0", (9, 0), True),  # as in TORCH_CUDA_ARCH_LIST
        ("8.0 9.0", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),  # the suffix binds code and PTX to one architecture
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("Hopper", (8, 0), True),  # unknown: no claim
    ],
)
def test_which_gpus_a_build_runs_on(built, capability, runs):
    assert fits(built, capability) is runs


_WITH_GPU = """
import warnings
import torch
from d2ext.ops import _library
_library.ARCHITECTURES = "9.0+PTX"
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_name = lambda i: "some GPU"
torch.cuda.get_device_capability = lambda i: [(9, 0), {second}][i]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _library.watch_devices()
    assert not caught
    calls = [call for call, _ in torch.cuda._queued_calls if call is _library.check_devices]
    for call in calls * 2:  # what torch does when CUDA is initialized
        call()
print(len(calls), "calls")
print(*(str(x.message) for x in caught), sep="\\n")
print(_library.implementation("roi_warp", "cuda"))
"""


def test_a_gpu_that_no_kernel_fits_gets_the_pytorch_implementations(run_python):
    process = run_python("-c", _WITH_GPU.replace("{second}", "(8, 0)"))
    calls, warning, kind = process.stdout.splitlines()
    assert calls == "1 calls"
    assert "kernels built for 9.0+PTX, some GPU is 8.0; the PyTorch implementations" in warning
    assert "TORCH_CUDA_ARCH_LIST" in warning
    assert kind == "('pytorch', 'kernels built for 9.0+PTX, some GPU is 8.0')"
    assert "previously registered" not in process.stderr


def test_gpus_that_the_kernels_fit_are_left_alone(run_python):
    process = run_python("-c", _WITH_GPU.replace("{second}", "(10, 0)"))
    assert "implementations" not in process.stdout
    assert "kernels built for" not in process.stdout


_REPLACED = """
import torch
from d2ext import ops
from d2ext.ops import _library
from d2ext.ops.reference import roi_warp as reference
torch.manual_seed(0)
feature, rois = torch.randn(1, 3, 9, 9), torch.tensor([[0, 1.3, 2.1, 7.7, 8.1]])
_library.use_references("CPU", "for a test")
reference.Called = 0
forward = reference._Warp.forward
def counted(self):
    reference.Called += 1
    return forward(self)
reference._Warp.forward = counted
feature.requires_grad_()
ops.roi_warp(feature, rois, 3, 1.0).sum().backward()
print(reference.Called, feature.grad.abs().sum() > 0, _library.implementation("roi_warp", "cpu"))
"""


def test_kernels_are_replaced_for_a_device(run_python):
    process = run_python("-c", _REPLACED)
    assert process.stdout == "1 tensor(True) ('pytorch', 'for a test')\n", process.stderr


def copied(folder):
    shutil.copytree(
        ROOT / "d2ext", folder / "d2ext", ignore=shutil.ignore_patterns("*.so", "csrc", "*.pyc")
    )
    return folder / "d2ext/_C.abi3.so"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_an_extension_of_another_torch_is_named_with_its_symbol_and_the_mend(tmp_path, run_python):
    library = copied(tmp_path)
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int _ZN2at5otherEv(); static int made = _ZN2at5otherEv();')
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    process = run_python("-c", "import d2ext.ops", path=[tmp_path])
    assert process.returncode == 0, process.stderr
    (line,) = (x for x in process.stderr.splitlines() if "d2ext.ops:" in x)
    assert "built for another torch, which had the symbol _ZN2at5otherEv;" in line
    assert f"Build it for torch {torch.__version__}:" in line
    assert "setup.py build_ext --inplace` in a clone" in line
    assert "`pip install --no-build-isolation --no-deps --force-reinstall` of the sdist" in line


def test_a_file_that_is_no_library_is_named(tmp_path, run_python):
    copied(tmp_path).write_text("nothing")
    process = run_python("-m", "d2ext.ops", path=[tmp_path])
    assert process.returncode == 0, process.stderr
    (line,) = (x for x in process.stderr.splitlines() if "d2ext.ops:" in x)
    assert "_C.abi3.so cannot be loaded:" in line and "file too short" in line
    assert "cannot be loaded" in process.stdout.splitlines()[0]


@pytest.mark.skipif(not ops.has_native(), reason="needs the extension")
def test_the_extension_tells_what_it_was_built_for():
    cuda = _library.implementation("roi_warp", "cuda")[0] == "native"
    assert bool(_library.ARCHITECTURES) == cuda
