"""What the benchmarks say about the machine, and its floors: bytes and operations per second."""

import os
import platform
import subprocess
import time
from collections.abc import Callable

import torch
import torchvision

# With D2EXT_EMULATED=1 the extension at hand has the CUDA kernels in the place of those of the CPU
# (tests/ops/emulation), so that everything made for a GPU can be rehearsed without one.
EMULATED = os.environ.get("D2EXT_EMULATED", "0") not in ("", "0")


def device_of(kind: str) -> torch.device:
    """Where the tensors of a run on "cpu" or "cuda" are."""
    return torch.device("cpu" if EMULATED else kind)


def time_once(run: Callable, device: torch.device) -> tuple[float, float]:
    """Wall and process CPU seconds."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def seconds(run: Callable, device: torch.device) -> float:
    """Of the processor on one thread, which other programs disturb less than the clock."""
    wall, cpu = time_once(run, device)
    return cpu if device.type == "cpu" and torch.get_num_threads() == 1 else wall


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device copy, read and write counted, outside the caches."""
    source = torch.empty(64 << 20, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * 4 / best / 1e9


def peak_gflops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a square matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(5))
    return 2 * n**3 / best / 1e9


def describe(device: torch.device) -> list[str]:
    """Lines about device, versions, commit and load."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            model = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {model}"
    name += ", emulating a GPU" * EMULATED
    return [
        f"device {name}, {os.cpu_count()} processors, {torch.get_num_threads()} thread(s),"
        f" torch ISA {torch.backends.cpu.get_cpu_capability()}",
        f"torch {torch.__version__}, torchvision {torchvision.__version__},"
        f" commit {commit or 'unknown'}",
        f"load {os.getloadavg()[0]:.2f}",
    ]
