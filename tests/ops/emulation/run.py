"""The operator tests on the emulated kernels, with the threads of a block in three orders:
`python -m tests.ops.emulation.run`, which is `make emulate`."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.ops.emulation.build import JOBS, ROOT, folder

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
    """Run pytest in a process whose operators are the emulated kernels, or fail.

    Args:
        base: folder of the emulated extension.
        arguments: for pytest; `tests/ops` is there.
        order: of the threads of a block: 0 ascending, 1 descending, more: at random.
    """
    environment = {**os.environ, "PYTHONPATH": str(base.resolve()), "EMULATION_ORDER": str(order)}
    environment["OMP_NUM_THREADS"] = "1"
    for name in ("PYTEST_ADDOPTS", "D2EXT_DISABLE_EXT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    with tempfile.TemporaryDirectory(prefix="d2ext-emulation-") as place:
        for name in ("ops", "vectors"):
            shutil.copytree(ROOT / "tests" / name, Path(place, "tests", name))
        shutil.copyfile(ROOT / "pyproject.toml", Path(place, "pyproject.toml"))
        return subprocess.run(
            [*command, *arguments], cwd=place, env=environment, capture_output=True, text=True
        )


def main() -> None:
    base = folder()
    files = sorted(path.name for path in (ROOT / "tests/ops").glob("test_*.py"))
    calls = [(order, file) for order in range(3) for file in files if file not in OF_NO_KERNEL]
    begin = time.monotonic()
    with ThreadPoolExecutor(JOBS) as pool:
        running = {pool.submit(run_tests, base, [f"tests/ops/{f}"], n): (n, f) for n, f in calls}
        for future in as_completed(running):
            process, (order, file) = future.result(), running[future]
            last = process.stdout.strip().splitlines()[-1]
            minutes = (time.monotonic() - begin) / 60
            print(f"{minutes:.1f} min: order {order}, {file}: {last}", flush=True)
            if process.returncode:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(process.stdout[-4000:] + process.stderr[-2000:])


if __name__ == "__main__":
    main()
