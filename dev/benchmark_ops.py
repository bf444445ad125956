#!/usr/bin/env python
"""Time the operators of d2ext.ops beside what users run today, with checks and gates.

    python dev/benchmark_ops.py --allocator retained,default    # the tables of docs/benchmarks
    python dev/benchmark_ops.py --quick                         # small sizes, a few seconds
    python dev/benchmark_ops.py --device cuda

Ours and its peers run interleaved (A B C A B C ...) in one process on fresh random inputs. Before
any timing each operator is compared with a float64 reference. On one CPU thread ratios are those of
process time, which other programs disturb less than wall time. On CUDA, what is done in less than
a millisecond is replayed as a CUDA graph where it can be: rows say "(graph)". Exit status 1 when a
gate of the device (dev/op_gates.py) fails on a quiet row.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

RETAIN = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
COLUMNS = (
    "op | size | dtype | layout | fwd or f+b | impl | median ms | min ms | cpu ms | MB floor |"
    " floor ms | x floor | ours is Nx faster | max rel err | threads | noisy"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", default="1", help="comma separated, CPU only")
    parser.add_argument("--allocator", default="retained", help="retained, default, or both")
    parser.add_argument("--rounds", type=int, default=0, help="0: 5 on the CPU, 20 on CUDA")
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small sizes, no gates")
    parser.add_argument("--extra", action="store_true", help="also N = 1, 64, 1000, B = 2, bf16")
    parser.add_argument("--output", help="also write the report to this Markdown file")
    return parser.parse_args()


def restart_for_allocators(arguments: argparse.Namespace) -> None:
    """One child process per allocator mode: glibc reads its settings at start."""
    modes = arguments.allocator.split(",")
    if len(modes) == 1 and (modes[0] == "default" or RETAIN.items() <= os.environ.items()):
        return
    status, reports = 0, []
    for mode in modes:
        env = {**os.environ, **(RETAIN if mode == "retained" else {})}
        command = [sys.executable, *sys.argv, "--allocator", mode]
        if arguments.output:
            part = f"{arguments.output}.{mode}"
            command += ["--output", part]
            reports.append(part)
        status |= subprocess.run(command, env=env, check=False).returncode
    if arguments.output:
        with open(arguments.output, "w") as out:
            for part in reports:
                with open(part) as report:
                    out.write(report.read() + "\n")
                os.remove(part)
    sys.exit(status)


ARGUMENTS = parse_arguments()
restart_for_allocators(ARGUMENTS)

import machine  # noqa: E402  after the allocator is settled
import op_peers  # noqa: E402
import torch  # noqa: E402
from op_cases import Case, Cases  # noqa: E402
from op_gates import gates_of  # noqa: E402

from d2ext import ops  # noqa: E402

KIND = ARGUMENTS.device
DEVICE = machine.device_of(KIND)
# Seconds on the device below which launching takes part in the time of an eager call.
LAUNCH_SIZED = 1e-3


# ------------------------------------------------------------------ measuring
def busy_ticks() -> float:
    """Busy seconds of all processors so far."""
    with open("/proc/stat") as stat:
        values = [int(x) for x in stat.readline().split()[1:]]
    return (sum(values[:3]) + sum(values[5:8])) / os.sysconf("SC_CLK_TCK")


def time_once(run: Callable) -> tuple[float, float]:
    return machine.time_once(run, DEVICE)


def graphed(run: Callable, tensors: tuple) -> Callable | None:
    """`run` as a CUDA graph, or None when it cannot be captured."""
    if machine.EMULATED:
        return lambda: run(*tensors)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(*tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(*tensors)
        return graph.replay
    except RuntimeError:
        return None


def without_launches(run: Callable, sets: list[tuple]) -> list[Callable] | None:
    """Replays of `run` on each of the inputs, where the work itself is that of few launches.

    The replay tells, not the eager call: that one waits for the launches, however little there is
    to do on the device.
    """
    first = graphed(run, sets[0])
    if first is None:
        return None
    first()
    if min(time_once(first)[0] for _ in range(3)) >= LAUNCH_SIZED:
        return None
    replays = [first, *(graphed(run, inputs) for inputs in sets[1:])]
    return replays if all(replays) else None


def measure(case: Case, rounds: int) -> tuple[dict[str, list[tuple[float, float]]], set[str], bool]:
    """Times per implementation, interleaved; which of them were CUDA graphs; and whether others
    used the processors meanwhile."""
    torch.manual_seed(0)  # the same inputs for every number of threads and every allocator
    sets = [case.inputs() for _ in range(3)]
    while KIND == "cuda" and len(sets) * case.floor_mb < 150 and len(sets) < 12:
        sets.append(case.inputs())
    times = {name: [] for name in case.runs}
    context = torch.no_grad if case.direction == "fwd" else torch.enable_grad
    with context():
        calls = {name: [lambda r=run, s=s: r(*s) for s in sets] for name, run in case.runs.items()}
        for name in calls:
            for _ in range(2):
                calls[name][0]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        replayed = set()
        for name, run in case.runs.items() if KIND == "cuda" else ():
            replays = without_launches(run, sets)
            if replays:
                calls[name] = replays
                replayed.add(name)
        wall, own, busy = time.perf_counter(), time.process_time(), busy_ticks()
        for i in range(rounds):
            for name in calls:
                times[name].append(time_once(calls[name][i % len(calls[name])]))
        wall = time.perf_counter() - wall
        foreign = busy_ticks() - busy - (time.process_time() - own)
    noisy = KIND == "cpu" and foreign > 0.1 * wall * (os.cpu_count() or 1)
    return times, replayed, noisy


def header(bandwidth: float) -> list[str]:
    kind = "native" if ops.has_native() else "PyTorch fallback"
    missing = "detectron2 is not installed: its implementations and their gates are left out"
    return [
        *machine.describe(DEVICE),
        *([] if op_peers.HAS_DETECTRON2 else [missing]),
        f"extension: {kind}, allocator {ARGUMENTS.allocator}",
        f"copy {bandwidth:.1f} GB/s, matrix product {machine.peak_gflops(DEVICE):.0f} GFLOP/s",
    ]


def run_case(
    case: Case, threads: int, bandwidth: float, rounds: int
) -> tuple[list[str], list[str], bool]:
    """Table rows, gate lines, and whether a gate failed on a quiet row."""
    error = case.error(case.inputs())
    print(f"# {case.op} {case.size} {case.direction}: relative error {error:.1e}", file=sys.stderr)
    times, replayed, noisy = measure(case, rounds)
    median = {name: statistics.median(t[0] for t in values) for name, values in times.items()}
    # processor time decides ratios on one thread: it does not feel the neighbours
    if KIND == "cpu" and threads == 1:
        weight = {name: statistics.median(t[1] for t in v) for name, v in times.items()}
    else:
        weight = median
    floor = case.floor_mb / 1e3 / bandwidth
    rows, lines, failed = [], [], False
    for name, values in times.items():
        row = [
            case.op, case.size, case.dtype, case.layout, case.direction,
            f"{name} (graph)" if name in replayed else name,
            f"{median[name] * 1e3:.3f}", f"{min(t[0] for t in values) * 1e3:.3f}",
            f"{statistics.median(t[1] for t in values) * 1e3:.3f}", f"{case.floor_mb:.1f}",
            f"{floor * 1e3:.3f}", f"{weight[name] / floor:.1f}",
            f"{weight[name] / weight['ours']:.1f}", f"{error:.1e}" if name == "ours" else "",
            str(threads), "noisy" if noisy else "",
        ]  # fmt: skip
        rows.append(" | ".join(row))
    gates = gates_of(KIND, case.op, case.direction, case.layout)
    checks = [
        (f"vs {name} >= {x:g}x", weight[name] / weight["ours"], x, True)
        for name, x in gates.peers
        if name in weight
    ]
    if gates.floor is not None:
        value = weight["ours"] / floor
        checks.append((f"at most {gates.floor:g}x its floor", value, gates.floor, False))
    for text, value, limit, more in checks if case.gated and not ARGUMENTS.quick else []:
        good = value >= limit if more else value <= limit
        failed |= not good and not noisy
        lines.append(
            f"{'PASS' if good else 'FAIL'} {case.op} {case.size} {case.direction},"
            f" {threads} thread(s):"
            f" {text}, measured {value:.1f}x{' (noisy)' if noisy else ''}"
        )
    return rows, lines, failed


def main() -> int:
    torch.manual_seed(0)
    rounds = ARGUMENTS.rounds or (20 if KIND == "cuda" else 5)
    threads_list = [int(x) for x in ARGUMENTS.threads.split(",")] if KIND == "cpu" else [1]
    torch.set_num_threads(threads_list[0])
    bandwidth = machine.copy_bandwidth(DEVICE)
    report = [*header(bandwidth), "", COLUMNS, " | ".join(["---"] * 16)]
    print("\n".join(report), flush=True)
    gates, failed = [], False
    for threads in threads_list:
        if KIND == "cpu":
            torch.set_num_threads(threads)
        for case in Cases(DEVICE, ARGUMENTS.quick, KIND).all_cases(ARGUMENTS.extra):
            if ARGUMENTS.only not in f"{case.op} {case.size} {case.direction}":
                continue
            rows, lines, bad = run_case(case, threads, bandwidth, rounds)
            print("\n".join(rows), flush=True)
            report += rows
            gates += lines
            failed |= bad
    print("\n" + "\n".join(gates))
    if ARGUMENTS.output:
        with open(ARGUMENTS.output, "w") as out:
            table = report.index("") + 1
            out.write("\n".join(f"- {line}" for line in report[: table - 1]) + "\n\n")
            out.write("\n".join(f"| {line} |" for line in report[table:]) + "\n\n")
            out.write("\n".join(f"- {line}" for line in gates) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
