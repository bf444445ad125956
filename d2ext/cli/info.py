"""Say what is installed and what runs where: versions, projects, compiled kernels, data, GPU."""

import argparse
import importlib.metadata
import os
import platform

import torch

from d2ext.config import load_projects
from d2ext.config.find import shipped_configs
from d2ext.engine.cli import run_guarded
from d2ext.ops.__main__ import main as print_operators
from d2ext.version import __version__

PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "opencv-python-headless", "pillow")


def argument_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__)


def versions() -> list[tuple[str, str]]:
    """(what, version or place) of everything that a result may depend on."""
    import detectron2

    lines = [("d2ext", f"{__version__} in {os.path.dirname(os.path.dirname(__file__))}")]
    place = os.path.dirname(detectron2.__file__)
    lines.append(("detectron2", f"{detectron2.__version__} in {place}"))
    lines += [(name, _version(name)) for name in PACKAGES]
    lines.append(("python", f"{platform.python_version()}, {platform.platform()}"))
    lines.append(("projects", ", ".join(load_projects()) or "none"))
    lines.append(("configs", f"{len(shipped_configs())}; d2ext list"))
    lines.append(("data sets", os.path.abspath(os.environ.get("DETECTRON2_DATASETS", "datasets"))))
    lines.append(("CPU", f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"))
    return lines + (_gpus() or [("GPU", "none that torch sees")])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed by this name"


def _gpus() -> list[tuple[str, str]]:
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        (f"GPU {i}", f"{x.name}, {x.total_memory / 2**30:.0f} GiB, sm_{x.major}{x.minor}")
        for i, x in enumerate(gpus)
    ]


def run() -> None:
    for name, value in versions():
        print(f"{name:24} {value}")
    print()
    print_operators()


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    argument_parser().parse_args(arguments)
    return run_guarded(run)
