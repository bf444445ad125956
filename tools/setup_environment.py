#!/usr/bin/env python3
"""Make a virtual environment that runs this repository; what `make install` calls.

Needs nothing but the standard library. Checks first whether the installation can work and says in
one line why not. Torch and detectron2 that are already in the environment are used as they are. A
second call does nothing, unless the requirements, build files or C++ sources have changed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
SUPPORTED = ((3, 10), (3, 13))  # first one in, first one out
NEEDED_GIB = 8  # torch's CUDA build with its libraries, unpacked, and the wheels on the way


class CannotInstall(Exception):
    """One line for the user."""


def check_machine(venv: Path) -> None:
    """Raise `CannotInstall` for what would make the installation fail half-way."""
    version = sys.version_info[:2]
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise CannotInstall(
            f"Python {version[0]}.{version[1]} is not supported (3.10 to 3.12 are); "
            "name another one, e.g. `make install PYTHON=python3.11`"
        )
    if sys.platform not in ("linux", "darwin"):
        raise CannotInstall(f"{sys.platform} is not supported; Linux and macOS are")
    try:
        import ensurepip  # noqa: F401
        import venv as _venv  # noqa: F401
    except ImportError as error:
        raise CannotInstall(
            f"this Python lacks the module {error.name}; on Debian: apt-get install python3-venv"
        ) from error
    folder = venv.parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise CannotInstall(f"{folder} is not writable; choose a place with VENV=...")
    free = shutil.disk_usage(folder).free / 2**30
    if not (venv / "bin" / "python").exists() and free < NEEDED_GIB:
        raise CannotInstall(
            f"{free:.1f} GiB free on the disk of {folder}, about {NEEDED_GIB} are needed; "
            "choose a place with VENV=..."
        )
    if venv.exists() and not (venv / "bin" / "python").exists():
        raise CannotInstall(
            f"{venv} exists but is not a virtual environment; remove it or set VENV="
        )


def check_checkout(folder: Path) -> None:
    """Raise `CannotInstall` unless a folder holds the sources of detectron2."""
    for name in ("setup.py", "detectron2/__init__.py"):
        if not (folder / name).is_file():
            raise CannotInstall(f"{folder} is no checkout of detectron2: it has no {name}")


def fingerprint(detectron2: Path | None = None) -> str:
    """Hash of everything an installation depends on."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", Path(__file__)]
    files += sorted(REQUIREMENTS.iterdir())
    files += sorted(p for p in (ROOT / "d2ext" / "csrc").rglob("*") if p.is_file())
    files += sorted(ROOT.glob("projects/*/*/__init__.py"))
    files += sorted(detectron2.glob("detectron2/**/*.py")) if detectron2 else []
    digest = hashlib.sha256()
    for path in files:
        name = os.path.relpath(path, ROOT)
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    for name in ("D2EXT_BUILD_EXT", "FORCE_CUDA", "CXX", "TORCH_CUDA_ARCH_LIST"):
        digest.update(f"{name}={os.environ.get(name, '')}\0".encode())
    return digest.hexdigest() + f" {ROOT}"


def run(*command, **environment) -> None:
    """Run a command quietly; on failure show its last lines."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    result = subprocess.run(
        [str(c) for c in command],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        sys.stderr.write("\n".join(result.stdout.splitlines()[-25:]) + "\n")
        raise CannotInstall(f"`{' '.join(str(c) for c in command)}` failed, see above")
    for line in result.stdout.splitlines():
        if line.strip().startswith("d2ext: "):  # what setup.py says about the extension
            print("  " + line.strip())


def has(python: Path, module: str) -> bool:
    """Whether the environment has a module (found, not imported)."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([str(python), "-c", code], cwd="/").returncode == 0


def torch_works(python: Path) -> bool:
    """Whether torch >= 2.4 and a torchvision that loads with it are there."""
    code = (
        "import torch, torchvision, sys;"
        "v = tuple(int(x) for x in torch.__version__.split('+')[0].split('.')[:2]);"
        "torch.ops.torchvision.nms; sys.exit(v < (2, 4))"
    )
    return (
        subprocess.run([str(python), "-c", code], cwd="/", stderr=subprocess.DEVNULL).returncode
        == 0
    )


def install_detectron2(python: Path, checkout: Path | None) -> None:
    """The Python files of v0.6, unless detectron2 is there; or a checkout, compiled."""
    pip = (python, "-m", "pip", "install", "--no-cache-dir", "--use-pep517")
    pip += ("--no-build-isolation", "--no-deps")
    if checkout:
        print(f"* detectron2 of {checkout} (compiling it takes some minutes)")
        with tempfile.TemporaryDirectory() as folder:  # its setup.py writes into its own folder
            copy = Path(folder) / "detectron2"
            shutil.copytree(checkout, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
            run(*pip, "--force-reinstall", copy)
    elif has(python, "detectron2"):
        print("* detectron2 is there and is used as it is")
    else:
        print("* detectron2 v0.6, Python files only")
        pinned = ("--require-hashes", "-r", REQUIREMENTS / "detectron2.txt")
        run(*pip, *pinned, DIST_EXTRA_CONFIG=str(REQUIREMENTS / "detectron2-build.cfg"))


def install(venv: Path, development: bool, detectron2: Path | None = None) -> None:
    """Create or complete the environment."""
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"* virtual environment in {venv}")
        run(sys.executable, "-m", "venv", venv)
    pip = (python, "-m", "pip", "install")
    print("* build tools")
    run(*pip, "-r", REQUIREMENTS / "build.txt")
    base = REQUIREMENTS / "base.txt"
    if has(python, "torch"):
        if not torch_works(python):
            raise CannotInstall(
                f"the torch and torchvision in {venv} are older than 2.4 or do not load together; "
                "remove them or set VENV= to a new folder"
            )
        base = venv / "base-without-torch.txt"
        lines = (REQUIREMENTS / "base.txt").read_text().splitlines()
        base.write_text("\n".join(x for x in lines if not x.startswith("torch")) + "\n")
        print("* dependencies (the torch that is there is kept)")
    else:
        print("* torch and dependencies (a minute or more: about 3 GB with the CUDA libraries)")
    run(*pip, "--no-build-isolation", "-r", base)
    install_detectron2(python, detectron2)
    if development:
        print("* tools for tests, style, types and the site")
        run(*pip, "-r", REQUIREMENTS / "dev.txt")
    print("* d2ext and its projects, with the C++ extension if a compiler is there")
    run(*pip, "-v", "--no-build-isolation", "--no-deps", "-e", ROOT)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--venv", default=ROOT / ".venv", type=Path, help="folder of the environment"
    )
    parser.add_argument("--no-dev", action="store_true", help="leave out the tools of development")
    parser.add_argument("--detectron2", type=Path, help="checkout to install in place of v0.6")
    args = parser.parse_args()
    venv = Path(os.path.abspath(args.venv))
    stamp = venv / ".d2ext-installed"
    checkout = args.detectron2 and args.detectron2.resolve()
    wanted = fingerprint(checkout)
    if stamp.is_file() and stamp.read_text() == wanted and (venv / "bin" / "python").exists():
        return 0
    try:
        check_machine(venv)
        if checkout:
            check_checkout(checkout)
        install(venv, development=not args.no_dev, detectron2=checkout)
    except CannotInstall as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stamp.write_text(fingerprint(checkout))
    print(f"* done; `source {venv}/bin/activate` to use it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
