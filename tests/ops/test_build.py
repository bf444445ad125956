"""setup.py: what is built when, and what is said in one line when something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# setup() prints what it would build instead of building
SCRIPT = """
import os, runpy, shutil, sys, setuptools
def show(**kwargs):
    for module in kwargs.get("ext_modules", []):
        print("MODULE", module.name, type(module).__name__, len(module.sources))
        print("CUDA", any(source.endswith(".cu") for source in module.sources))
    print("PACKAGES", *sorted(kwargs["packages"]))
setuptools.setup = show
# a stand-in for torch: what is tested is what setup.py makes of it
import types
class CppExtension:
    def __init__(self, name, sources, **kwargs):
        self.name, self.sources = name, sources
class CUDAExtension(CppExtension):
    pass
torch, extension = types.ModuleType("torch"), types.ModuleType("torch.utils.cpp_extension")
torch.version = types.SimpleNamespace(cuda="13.0")
extension.BuildExtension, extension.CppExtension = object, CppExtension
extension.CUDAExtension = CUDAExtension
sys.modules.update({
    "torch": torch, "torch.utils": types.ModuleType("torch.utils"),
    "torch.utils.cpp_extension": extension,
})
sys.argv = ["setup.py", "build_ext"]
{before}
runpy.run_path("setup.py", run_name="__main__")
"""
HIDE_NVCC = """
which, exists = shutil.which, os.path.exists
shutil.which = lambda name, *a, **k: None if name == "nvcc" else which(name, *a, **k)
os.path.exists = lambda path: "nvcc" not in str(path) and exists(path)
"""
FAKE_NVCC = """
import subprocess
shutil.which = lambda name, *a, **k: "/fake/" + name
run = subprocess.run
def fake(command, *args, **kwargs):
    if command[0].endswith("nvcc"):
        return subprocess.CompletedProcess(command, 0, "Cuda tools, release {release}, V")
    return run(command, *args, **kwargs)
subprocess.run = fake
"""


def run_setup(before="", **environment):
    drop = ("FORCE_CUDA", "D2EXT_BUILD_EXT", "CUDA_HOME", "CUDA_PATH", "CXX")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    command = [sys.executable, "-c", SCRIPT.replace("{before}", before)]
    return subprocess.run(
        command, env={**env, **environment}, capture_output=True, text=True, cwd=ROOT
    )


def test_projects_and_configs_are_packaged():
    packages = run_setup(D2EXT_BUILD_EXT="0").stdout.split("PACKAGES ")[1].split()
    assert "d2ext.ops.reference" in packages
    for name, folder in {
        "d2ext.projects.mnc": "projects/MNC/mnc",
        "d2ext.projects.fcis": "projects/FCIS/fcis",
        "d2ext.projects.htc": "projects/HTC/htc",
        "d2ext.configs": "configs",
    }.items():
        assert (name in packages) == (ROOT / folder / "__init__.py").is_file()


def test_pure_python_on_purpose():
    result = run_setup(D2EXT_BUILD_EXT="0")
    assert result.returncode == 0 and "MODULE" not in result.stdout
    assert result.stdout.count("\n") == 1


def test_without_a_compiler_one_line_says_what_happens():
    result = run_setup("shutil.which = lambda *a, **k: None")
    assert result.returncode == 0 and "MODULE" not in result.stdout
    lines = [line for line in result.stdout.splitlines() if not line.startswith("PACKAGES")]
    assert len(lines) == 1
    assert "without the extension" in lines[0]
    assert "PyTorch implementations will be used" in lines[0]


def test_without_torch_one_line_names_the_option():
    result = run_setup("sys.modules['torch'] = None\nshutil.which = lambda name, *a, **k: name")
    assert result.returncode != 0
    assert result.stderr.strip().count("\n") == 0
    assert "--no-build-isolation" in result.stderr


def test_without_nvcc_the_cpu_kernels_are_built():
    result = run_setup(HIDE_NVCC + "shutil.which = lambda n, *a, **k: None if n == 'nvcc' else n")
    assert result.returncode == 0, result.stderr
    assert "MODULE d2ext._C" in result.stdout and "CUDA False" in result.stdout


def test_cuda_forced_without_nvcc_is_an_error_of_one_line():
    code = HIDE_NVCC + "shutil.which = lambda n, *a, **k: None if n == 'nvcc' else n"
    result = run_setup(code, FORCE_CUDA="1")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("d2ext: FORCE_CUDA=1, but nvcc was")


@pytest.mark.parametrize(
    ("release", "force", "cuda"),
    [("13.1", None, True), ("12.4", None, False), ("13.0", "0", False), ("13.0", "1", True)],
)
def test_nvcc_of_the_same_major_version_decides(release, force, cuda):
    code = FAKE_NVCC.replace("{release}", release)
    result = run_setup(code, **({} if force is None else {"FORCE_CUDA": force}))
    assert result.returncode == 0, result.stderr
    assert f"CUDA {cuda}" in result.stdout
    assert f"MODULE d2ext._C {'CUDAExtension' if cuda else 'CppExtension'}" in result.stdout


def test_another_major_version_forced_is_an_error_of_one_line():
    result = run_setup(FAKE_NVCC.replace("{release}", "12.4"), FORCE_CUDA="1")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "is CUDA 12 and torch was built for CUDA 13.0" in last
