"""The operator tests on the emulated kernels, with the threads of a block in three orders:
`python -m tests.ops.emulation.run`, which is `make emulate`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.ops.emulation.build import ROOT, folder

# Tests of the CPU kernels' memory, of checks that would make a GPU wait, of compiling and of the
# command line.
LEFT_OUT = "not held and not little_else and not candidate_lists and not compiles and not command"
OF_NO_KERNEL = (
    "test_build.py",
    "test_cuda.py",
    "test_emulated_kernels.py",
    "test_emulated_traffic.py",
    "test_geometry.py",
    "test_library.py",
    "test_loading.py",
)


def run_tests(
    base: Path, arguments: Sequence[str], order: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process in which the operators are the emulated kernels.

    Args:
        base: folder of the emulated extension.
        arguments: for pytest; `tests/ops` is there.
        order: of the threads of a block: 0 ascending, 1 descending, more: at random.
    """
    shutil.rmtree(base / "tests", ignore_errors=True)
    for name in ("ops", "vectors"):
        shutil.copytree(ROOT / "tests" / name, base / "tests" / name)
    shutil.copyfile(ROOT / "pyproject.toml", base / "pyproject.toml")
    environment = {**os.environ, "PYTHONPATH": str(base), "EMULATION_ORDER": str(order)}
    environment["OMP_NUM_THREADS"] = "1"
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            LEFT_OUT,
            *arguments,
        ],
        cwd=base,
        env=environment,
        capture_output=True,
        text=True,
    )


def main() -> None:
    base = folder()
    files = sorted(path.name for path in (ROOT / "tests/ops").glob("test_*.py"))
    for order in range(3):
        for file in files:
            if file in OF_NO_KERNEL:
                continue
            process = run_tests(base, [f"tests/ops/{file}"], order)
            print(f"order {order}, {file}: {process.stdout.strip().splitlines()[-1]}", flush=True)
            if process.returncode:
                sys.exit(process.stdout[-4000:] + process.stderr[-2000:])


if __name__ == "__main__":
    main()
