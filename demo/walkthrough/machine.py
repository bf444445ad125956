"""What the demo runs on: how many threads to use, and a line that describes the machine."""

import os
import platform
from pathlib import Path

# Networks this small gain nothing from more threads.
_MAX_THREADS = 8


def usable_cores() -> int:
    """Physical cores this process may use: of its CPU affinity, within the quota of its cgroup."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cores = _physical_cores(allowed) or len(allowed or ()) or os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, quota) if quota else cores)


def default_threads() -> int:
    """OpenMP threads for one training."""
    return min(usable_cores(), _MAX_THREADS)


def _physical_cores(allowed, cpuinfo: str = "/proc/cpuinfo") -> int | None:
    """Cores without counting hyper-threads twice; None where the system does not tell."""
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8")
    except OSError:
        return None
    cores = set()
    for block in text.strip().split("\n\n"):
        values = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        values = {key.strip(): value.strip() for key, value in values.items()}
        if "core id" not in values:
            return None
        if allowed is None or int(values["processor"]) in allowed:
            cores.add((values.get("physical id"), values["core id"]))
    return len(cores) or None


def _cgroup_quota(folder: str = "/sys/fs/cgroup") -> int | None:
    """Processors granted to a container (cgroup v2 or v1), rounded down, at least 1; else None."""
    root = Path(folder)
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file; "max"
        return None


def describe() -> str:
    """Processor, number of cores and system, in one line."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    count = usable_cores()
    return f"{name}, {count} core{'' if count == 1 else 's'}, {platform.system()}"
