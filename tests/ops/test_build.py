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
        print("FLAGS", *module.flags.get("nvcc", []))
        print("CXX", *module.flags["cxx"])
    print("PACKAGES", *sorted(kwargs["packages"]))
setuptools.setup = show
# a stand-in for torch: what is tested is what setup.py makes of it
import types
class CppExtension:
    def __init__(self, name, sources, extra_compile_args, **kwargs):
        self.name, self.sources, self.flags = name, sources, extra_compile_args
class CUDAExtension(CppExtension):
    pass
torch, extension = types.ModuleType("torch"), types.ModuleType("torch.utils.cpp_extension")
torch.version = types.SimpleNamespace(cuda="13.0")
GPUS = []
torch.cuda = types.SimpleNamespace(
    device_count=lambda: len(GPUS), get_device_capability=lambda i: GPUS[i])
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
    if command[0].endswith("nvcc") and "--list-gpu-arch" in command:
        names = " ".join(f"compute_{number}" for number in {known})
        return subprocess.CompletedProcess(command, 0, names)
    if command[0].endswith("nvcc"):
        return subprocess.CompletedProcess(command, 0, "Cuda tools, release {release}, V")
    return run(command, *args, **kwargs)
subprocess.run = fake
"""


def fake_nvcc(release, known=(80, 90)):
    return FAKE_NVCC.replace("{release}", release).replace("{known}", str(list(known)))


def run_setup(before="", **environment):
    drop = (
        "FORCE_CUDA", "D2EXT_BUILD_EXT", "CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST",
        "D2EXT_NVCCFLAGS",
    )  # fmt: skip
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
    code = fake_nvcc(release)
    result = run_setup(code, **({} if force is None else {"FORCE_CUDA": force}))
    assert result.returncode == 0, result.stderr
    assert f"CUDA {cuda}" in result.stdout
    assert f"MODULE d2ext._C {'CUDAExtension' if cuda else 'CppExtension'}" in result.stdout


def test_another_major_version_forced_is_an_error_of_one_line():
    result = run_setup(fake_nvcc("12.4"), FORCE_CUDA="1")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "is CUDA 12 and torch was built for CUDA 13.0" in last


NVCC_12 = (50, 52, 60, 70, 72, 75, 80, 86, 87, 89, 90)
NVCC_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


@pytest.mark.parametrize(
    ("known", "gpus", "built"),
    [
        (NVCC_12, [], "7.0,8.0,9.0+PTX"),
        (NVCC_13, [], "7.5,8.0,9.0,10.0,11.0,12.0+PTX"),
        (NVCC_13, [(8, 6)], "8.6+PTX"),
        (NVCC_13, [(9, 0), (8, 0), (9, 0)], "8.0,9.0+PTX"),
        (NVCC_12, [(12, 0)], "7.0,8.0,9.0+PTX"),  # newer than nvcc: PTX
        (NVCC_13, [(7, 0)], "7.5,8.0,9.0,10.0,11.0,12.0+PTX"),  # older than nvcc: no kernel fits
    ],
)
def test_architectures_are_those_of_the_gpus_here_or_all_that_nvcc_knows(known, gpus, built):
    result = run_setup(fake_nvcc("13.0", known) + f"\nGPUS += {gpus}\n")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    (cxx,) = (line for line in lines if line.startswith("CXX"))
    assert f"-DD2EXT_ARCHITECTURES={built}" in cxx.split()
    (flags,) = (line for line in lines if line.startswith("FLAGS"))
    assert "-DD2EXT" not in flags  # nvcc would read `8.0,9.0` as two macros
    numbers = built.replace(".", "").removesuffix("+PTX").split(",")
    wanted = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    wanted.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    assert [flag for flag in flags.split() if "gencode" in flag] == wanted


def test_architectures_asked_for_are_left_to_torch():
    result = run_setup(fake_nvcc("13.0"), TORCH_CUDA_ARCH_LIST="8.6;9.0a+PTX")
    assert " -DD2EXT_ARCHITECTURES=8.6,9.0a+PTX\n" in result.stdout
    assert "gencode" not in result.stdout
