"""The CUDA kernels compiled for the CPU, in an extension that has them in the place of the CPU's.

Built once for a state of the sources, and kept in `build/emulation`. `folder()` has a copy of d2ext
with that extension, for processes of their own: `PYTHONPATH=folder python -m pytest tests/ops`.
One process at a time builds, and what has not changed is not written again: others may be using it.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-w", "-fno-math-errno", "-fno-trapping-math"]
COMPILER = os.environ.get("CXX", "g++").split()
BUILD = ROOT / "build/emulation"
JOBS = min(2, os.cpu_count() or 1)  # processes at a time
_LAUNCH = re.compile(r"\b([A-Za-z_]\w*)((?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def as_cplusplus(source: str) -> str:
    """CUDA source with what C++ has no syntax for rewritten, line by line the same."""
    source = _LAUNCH.sub(r"::emulation::launch(\1\2, \3)(", source)
    source = _SHARED.sub(r"auto* \2 = static_cast<\1*>(::emulation::dynamic_shared());", source)
    return source.replace("TORCH_LIBRARY_IMPL(d2ext, CUDA,", "TORCH_LIBRARY_IMPL(d2ext, CPU,")


def folder(change=lambda file, source: source, name: str = "plain") -> Path:
    """A folder with `d2ext` as it is, and the emulated extension in it.

    Args:
        change: gives the source of a file of `d2ext/csrc/cuda`, e.g. with a mistake planted.
        name: of the folder.
    """
    with _one_at_a_time():
        return _folder(change, BUILD / name)


def _folder(change, base: Path) -> Path:
    sources = {file.relative_to(ROOT) for file in (ROOT / "d2ext").rglob("*.py")}
    for file in (base / "d2ext").rglob("*.py"):
        if file.relative_to(base) not in sources:
            file.unlink()
    for file in sources:
        _write(base / file, (ROOT / file).read_text())
    csrc = base / "csrc"
    for header in (ROOT / "d2ext/csrc").glob("*.h"):
        _write(csrc / header.name, header.read_text())
    for file in (ROOT / "d2ext/csrc/cuda").iterdir():
        _write(csrc / "cuda" / file.name, as_cplusplus(change(file.name, file.read_text())))
    files = [*sorted((csrc / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda file: _compile(file, csrc), files))
    _link(objects, base / "d2ext/_C.abi3.so")
    return base


def _link(objects: list[Path], library: Path) -> None:
    from torch.utils.cpp_extension import library_paths

    linked = library.with_name("_C.objects.txt")
    names = "\n".join(path.name for path in objects)
    if library.is_file() and linked.is_file() and linked.read_text() == names:
        return
    paths = [f"-L{path}" for path in library_paths()]
    paths += [f"-Wl,-rpath,{path}" for path in library_paths()]
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ldl"]
    fresh = library.with_name(f"fresh.{os.getpid()}")
    command = [*COMPILER, "-shared", "-Wl,--no-undefined", *map(str, objects), *paths, *libraries]
    _run([*command, "-o", str(fresh)])
    os.replace(fresh, library)  # a process that has the old one keeps it
    _write(linked, names)


@contextlib.contextmanager
def _one_at_a_time():
    import fcntl  # not on Windows, where nothing of this runs

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    """Write a file in one go, unless it has that text."""
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text)
    os.replace(fresh, path)


def _compile(file: Path, csrc: Path) -> Path:
    """The object of a source file, compiled unless it was before."""
    import torch
    from torch.utils.cpp_extension import include_paths

    command = [*COMPILER, *FLAGS, f"-I{HERE / 'include'}", "-include", str(HERE / "emulation.h")]
    command += [f"-I{path}" for path in (csrc / "cuda", *include_paths())]
    if file.suffix == ".cu":
        command += ["-fsanitize=thread", "-fsanitize-coverage=trace-pc", "-fno-reorder-blocks"]
        command += ["-x", "c++"]
    command += [f"-ffile-prefix-map={csrc}=csrc"]
    own = [torch.__version__, *COMPILER, *FLAGS, file.suffix, *map(Path.read_text, _headers())]
    key = "\0".join([*own, *_texts(file, set())])
    output = BUILD / "objects" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.o"
    if not output.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = f"{output}.{os.getpid()}"
        _run([*command, "-c", str(file), "-o", fresh])
        os.replace(fresh, output)
    return output


def _headers() -> list[Path]:
    """What is included before every file, and instead of CUDA's headers."""
    return [HERE / "emulation.h", *sorted((HERE / "include").rglob("*.h"))]


def _texts(file: Path, known: set[Path]) -> list[str]:
    """A source and all that it includes of ours."""
    file = file.resolve()
    if file in known:
        return []
    known.add(file)
    text = file.read_text()
    names = re.findall(r'^#include "(.*)"', text, re.MULTILINE)
    return [text, *(t for name in names for t in _texts(file.parent / name, known))]


def _run(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)}\n{process.stderr[-4000:]}")
    return process.stdout


if __name__ == "__main__":
    print(folder())
