"""Builds the compiled operators and places the projects; all metadata is in pyproject.toml.

Environment:
    D2EXT_BUILD_EXT=0     no extension, on purpose
    FORCE_CUDA=1 / 0      with / without CUDA kernels; default: with, when a fitting nvcc is found
    TORCH_CUDA_ARCH_LIST  architectures; default: those of the GPUs here, or else 7.0 to 12.0 as
                          far as nvcc knows them
"""

import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MAPPED = {
    "d2ext.projects.mnc": "projects/MNC/mnc",
    "d2ext.projects.fcis": "projects/FCIS/fcis",
    "d2ext.projects.htc": "projects/HTC/htc",
    "d2ext.configs": "configs",
}
# Where the wheel has the configs of a project: as far from d2ext/configs as in the repository.
PROJECT_CONFIGS = {
    "d2ext.projects.mnc.configs": "projects/MNC/configs",
    "d2ext.projects.fcis.configs": "projects/FCIS/configs",
    "d2ext.projects.htc.configs": "projects/HTC/configs",
}
CONFIG_FILES = ["**/*.yaml", "**/*.py", "**/*.pth"]


def stop(message):
    sys.exit(f"d2ext: {message}")


def packages():
    """Names and folders of every package, projects and shared configs included."""
    names, folders = find_packages(include=["d2ext", "d2ext.*"]), {}
    for name, folder in MAPPED.items():
        if (ROOT / folder / "__init__.py").is_file():
            folders[name] = folder
            names.append(name)
            names += [f"{name}.{sub}" for sub in find_packages(folder)]
    for name, folder in PROJECT_CONFIGS.items():
        if (ROOT / folder).is_dir():
            folders[name] = folder
            names.append(name)
    return names, folders


def find_nvcc():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and os.path.exists(os.path.join(home, "bin", "nvcc")):
            return os.path.join(home, "bin", "nvcc")
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (default if os.path.exists(default) else None)


def with_cuda(torch):
    """Whether to compile the CUDA kernels; needs no visible GPU, build hosts have none."""
    wish = os.environ.get("FORCE_CUDA", "")
    if wish == "0":
        return False
    nvcc, wanted = find_nvcc(), torch.version.cuda
    if nvcc is None or wanted is None:
        if wish == "1":
            missing = "nvcc was not found (set CUDA_HOME)" if nvcc is None else "torch has no CUDA"
            stop(f"FORCE_CUDA=1, but {missing}")
        return False
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", text)
    if found is None or found.group(1) != wanted.split(".")[0]:
        version = found.group(1) if found else "unknown"
        if wish == "1":
            stop(
                f"FORCE_CUDA=1, but {nvcc} is CUDA {version} and torch was built for CUDA {wanted}"
            )
        print(f"d2ext: {nvcc} is CUDA {version}, torch needs {wanted}: building without CUDA")
        return False
    return True


def architectures(torch):
    """GPU architectures to build for, as in TORCH_CUDA_ARCH_LIST: those of the GPUs here, without
    any the first of every major version from 7 to 12, whose code runs on the others of it. The
    newest has PTX for GPUs that are newer still."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return re.split(r"[;,\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip())
    listed = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = sorted((int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)\b", listed))
    known = [arch for arch in known if (7, 0) <= arch < (13, 0)]
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    wanted = {max([x for x in known if x[0] == gpu[0] and x <= gpu], default=None) for gpu in here}
    if not here or None in wanted:
        wanted |= {min(x for x in known if x[0] == major) for major, _ in known}
    names = [f"{major}.{minor}" for major, minor in sorted(wanted - {None})]
    return [*names[:-1], f"{names[-1]}+PTX"] if names else ["9.0+PTX"]


def architecture_flags(names):
    """Of nvcc; given by us, as older versions of torch refuse architectures they do not know."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cudart_folder():
    """A folder to link libcudart from when the toolkit has none: torch's wheels bring it, but
    without the plain name that the linker asks for."""
    home = Path(find_nvcc()).resolve().parents[1]
    if any(list(home.glob(f"{sub}/libcudart.so")) for sub in ("lib64", "lib", "targets/*/lib")):
        return []
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for library in sorted(Path(folder).glob("*/lib/libcudart.so.*")):
            link = ROOT / "build" / "cudart" / "libcudart.so"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return [str(link.parent)]
    return []


def has_compiler():
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return os.name == "nt" or any(shutil.which(name) for name in names)


def extension():
    """Arguments for setup() that build d2ext._C, or none."""
    if os.environ.get("D2EXT_BUILD_EXT", "1") == "0":
        return {}
    if "egg_info" in sys.argv or "dist_info" in sys.argv or "sdist" in sys.argv:
        return {}
    if not has_compiler():
        print(
            "d2ext: no C++ compiler found: installing without the extension,"
            " the PyTorch implementations will be used"
        )
        return {}
    try:
        import torch
    except ImportError:
        stop("building needs torch at hand: install torch first, then add --no-build-isolation")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = glob.glob("d2ext/csrc/*.cpp") + glob.glob("d2ext/csrc/cpu/*.cpp")
    cxx = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wall", "-fopenmp", "-g0"]
    if os.name == "nt":
        cxx = ["/O2", "/openmp"]
    cxx += os.environ.get("D2EXT_CXXFLAGS", "").split()
    link = [] if os.name == "nt" else ["-fopenmp"]
    arguments, folders = {"cxx": cxx}, []
    kind = CppExtension
    if with_cuda(torch):
        kind = CUDAExtension
        sources += glob.glob("d2ext/csrc/cuda/*.cu")
        folders = cudart_folder()
        names = architectures(torch)
        print(f"d2ext: CUDA kernels for {', '.join(names)}")
        # For library.cpp; no macro of every file, as nvcc takes what follows a comma for another.
        cxx += [f"-DD2EXT_ARCHITECTURES={','.join(names)}"]
        arguments["nvcc"] = ["-O3", "--expt-relaxed-constexpr"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            arguments["nvcc"] += architecture_flags(names)
        arguments["nvcc"] += os.environ.get("D2EXT_NVCCFLAGS", "").split()
    module = kind(
        "d2ext._C",
        sorted(sources),
        library_dirs=folders,
        extra_compile_args=arguments,
        extra_link_args=link + os.environ.get("D2EXT_LDFLAGS", "").split(),
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


names, folders = packages()
setup(
    packages=names,
    package_dir=folders,
    package_data={
        **dict.fromkeys(["d2ext.configs", *PROJECT_CONFIGS], CONFIG_FILES),
        "d2ext.cli": ["project_template/**/*.j2"],
        "d2ext.report": ["template/*"],
    },
    **extension(),
)
