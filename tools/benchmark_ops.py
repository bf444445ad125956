#!/usr/bin/env python
"""Time the operators of d2ext.ops beside what users run today, with checks and gates.

    python tools/benchmark_ops.py --allocator retained,default    # the tables of docs/benchmarks
    python tools/benchmark_ops.py --quick                         # small sizes, a few seconds
    python tools/benchmark_ops.py --device cuda

Ours and its peers run interleaved (A B C A B C ...) in one process on fresh random inputs. Before
any timing each operator is compared with a float64 reference. On one CPU thread ratios are those of
process time, which other programs disturb less than wall time. Exit status 1 when a gate fails on a
quiet row.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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

import op_peers as peers_of  # noqa: E402
import torch  # noqa: E402  after the allocator is settled
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402

from d2ext import ops  # noqa: E402
from d2ext.ops.reference import joint_head as head_reference  # noqa: E402
from d2ext.ops.reference import mask_ops as mask_reference  # noqa: E402
from d2ext.ops.reference import roi_warp as warp_reference  # noqa: E402

DEVICE = torch.device(ARGUMENTS.device)
SCALE = peers_of.SCALE


def random_rois(count: int, batch: int, height: int, width: int) -> torch.Tensor:
    return peers_of.random_rois(count, batch, height, width).to(DEVICE)


def smooth_masks(count: int, size: int) -> torch.Tensor:
    return peers_of.smooth_masks(count, size).to(DEVICE)


# ------------------------------------------------------------------ cases
@dataclass
class Case:
    """One operator at one size; ``runs`` maps names of implementations to functions of inputs."""

    op: str
    size: str
    direction: str
    inputs: Callable[[], tuple]
    runs: dict[str, Callable]
    error: Callable[[tuple], float]
    floor_mb: float
    gates: list[tuple[str, float]] = field(default_factory=list)
    floor_gate: float | None = None
    dtype: str = "float32"
    layout: str = "NCHW"


def both(function: Callable, wrt: tuple[int, ...]) -> Callable:
    """Forward and backward of ``function`` with a gradient of ones-like noise."""

    def run(*inputs):
        *tensors, grad = inputs
        out = function(*tensors)
        torch.autograd.grad(out, [tensors[i] for i in wrt], grad)

    return run


def relative(found: torch.Tensor, oracle: torch.Tensor) -> float:
    oracle = oracle.double()
    return float((found.double() - oracle).norm() / oracle.norm().clamp(min=1e-30))


def warp_cases(channels, size, count=300, batch=1, pool=False, dtype=torch.float32, last=False):
    height, width = (12, 15) if ARGUMENTS.quick else (38, 63)
    channels, count = (min(channels, 32), min(count, 20)) if ARGUMENTS.quick else (channels, count)
    options = {"aligned": False}

    def inputs(grad):
        feature = torch.randn(batch, channels, height, width, device=DEVICE).to(dtype)
        if last:
            feature = feature.to(memory_format=torch.channels_last)
        rois = random_rois(count, batch, height * 16, width * 16)
        if not grad:
            return feature, rois
        out = torch.randn(count, channels, size, size, device=DEVICE).to(dtype)
        return feature.requires_grad_(), rois.requires_grad_(), out

    def ours(feature, rois):
        op = ops.roi_warp_max_pool if pool else ops.roi_warp
        return op(feature, rois, size, SCALE, **options)

    fine = 2 * size if pool else size
    finish = (lambda x: F.max_pool2d(x, 2)) if pool else (lambda x: x)
    peers = {"grid_sample folded": lambda f, r: finish(peers_of.grid_sample_folded(f, r, fine))}
    if not pool:
        peers["grid_sample expand"] = lambda f, r: peers_of.grid_sample_expand(f, r, fine)
        peers["roi_align sr=1"] = lambda f, r: torchvision.ops.roi_align(f, r, size, SCALE, 1, True)
    if batch > 1 or dtype != torch.float32:
        peers = {}

    def error(tensors):
        reference = warp_reference.roi_warp_max_pool if pool else warp_reference.roi_warp
        with torch.no_grad():
            few = tensors[1][:16]
            oracle = reference(tensors[0].double(), few, SCALE, size, size, **options)
            return relative(ours(tensors[0], few), oracle)

    item = torch.finfo(dtype).bits // 8
    feature_mb = batch * channels * height * width * item / 1e6
    out_mb = count * channels * size * size * item / 1e6
    name = "roi_warp_max_pool" if pool else "roi_warp"
    text = f"B{batch} C{channels} {size}x{size} N{count}"
    common = {"dtype": str(dtype)[6:], "layout": "NHWC" if last else "NCHW"}
    gated = batch == 1 and not last and count == 300 and dtype == torch.float32
    gates_f = [("grid_sample folded", 15.0)] if pool else [
        ("grid_sample folded", 5.0), ("grid_sample expand", 4.0),
    ]  # fmt: skip
    gates_b = [("grid_sample folded", 9.0)] if pool else [
        ("grid_sample folded", 5.0), ("roi_align sr=1", 12.0),
    ]  # fmt: skip
    yield Case(
        name, text, "fwd", lambda: inputs(False), {"ours": ours, **peers}, error,
        feature_mb + out_mb, gates_f if gated else [], 5.0 if gated and not pool else None,
        **common,
    )  # fmt: skip
    grads = {
        key: both(run, (0,) if key.startswith("roi_align") else (0, 1))
        for key, run in {"ours": ours, **peers}.items()
    }
    yield Case(
        name, text, "f+b", lambda: inputs(True), grads, error,
        2 * (feature_mb + out_mb) + feature_mb, gates_b if gated else [],
        5.0 if gated and not pool else None, **common,
    )  # fmt: skip


def head_cases(classes, count=300, batch=1, dtype=torch.float32):
    height, width = (12, 15) if ARGUMENTS.quick else (38, 63)
    classes, count = (min(classes, 9), min(count, 20)) if ARGUMENTS.quick else (classes, count)
    group, size = 7, 21
    channels = 2 * classes * group**2

    def inputs(grad):
        score = torch.randn(batch, channels, height, width, device=DEVICE).to(dtype)
        rois = random_rois(count, batch, height * 16, width * 16)
        if not grad:
            return score, rois
        return score.requires_grad_(), rois, torch.randn(count, classes, device=DEVICE).to(dtype)

    # The peers compute class scores only; so does "ours", where no class is picked for a mask.
    nothing = torch.full((count,), -1, device=DEVICE)

    def ours(score, rois):
        pick = nothing[: len(rois)]
        return ops.fcis_joint_head(score, rois, SCALE, group, size, pick, legacy=True)[0]

    def with_masks(score, rois):
        return ops.fcis_joint_head(score, rois, SCALE, group, size, legacy=True)[0]

    peers = {
        "integral image": lambda s, r: peers_of.head_of(
            peers_of.assembly_by_integral(s, r, group, size)
        ),
        "copy by index": lambda s, r: peers_of.head_of(
            peers_of.assembly_by_copy(s, r, group, size)
        ),
        "torchvision ps_roi_pool 7x7": lambda s, r: peers_of.head_by_torchvision_7x7(s, r, group),
    }
    if batch > 1 or dtype != torch.float32:
        peers = {}

    def error(tensors):
        with torch.no_grad():
            few = tensors[1][:16]
            oracle = head_reference.fcis_joint_head(
                tensors[0].double(), few, SCALE, group, size, legacy=True
            )[0]
            return relative(ours(tensors[0], few), oracle)

    mb = batch * channels * height * width * (torch.finfo(dtype).bits // 8) / 1e6
    text, gated = f"B{batch} K{classes} 21x21 N{count}", bool(peers) and count == 300
    names = list(peers)
    yield Case(
        "fcis_joint_head", text, "fwd", lambda: inputs(False),
        {"ours": ours, "ours and masks": with_masks, **peers}, error, mb,
        list(zip(names, (25.0, 6.0, 8.0), strict=False)) if gated else [],
        6.0 if gated else None, str(dtype)[6:],
    )  # fmt: skip
    yield Case(
        "fcis_joint_head", text, "f+b", lambda: inputs(True),
        {
            key: both(run, (0,))
            for key, run in {"ours": ours, "ours and masks": with_masks, **peers}.items()
        },
        error, 3 * mb,
        list(zip(names, (20.0, 6.0, 5.0), strict=False)) if gated else [],
        6.0 if gated else None, str(dtype)[6:],
    )  # fmt: skip


def assemble_case(classes, count=300):
    height, width = (12, 15) if ARGUMENTS.quick else (38, 63)
    classes, count = (min(classes, 5), min(count, 20)) if ARGUMENTS.quick else (classes, count)
    channels = 2 * classes * 49

    def inputs():
        score = torch.randn(1, channels, height, width, device=DEVICE)
        return score, random_rois(count, 1, height * 16, width * 16)

    def ours(score, rois):
        return ops.ps_roi_assemble(score, rois, SCALE, 7, 21, legacy=True)

    def error(tensors):
        oracle = head_reference.Assembly(
            tensors[0].shape, tensors[1], SCALE, 7, 21, False, True
        ).mean(head_reference.integral(tensors[0], 49))
        return relative(ours(*tensors), oracle.permute(0, 3, 1, 2))

    mb = (channels * height * width + count * 2 * classes * 441) * 4 / 1e6
    peers = {"integral image": lambda s, r: peers_of.assembly_by_integral(s, r, 7, 21)}
    yield Case(
        "ps_roi_assemble", f"K{classes} 21x21 N{count}", "fwd", inputs, {"ours": ours, **peers},
        error, mb,
    )  # fmt: skip


def paste_case(height, width, count=100):
    from torchvision.models.detection.roi_heads import paste_masks_in_image as torchvision_paste

    from detectron2.layers.mask_ops import paste_masks_in_image

    if ARGUMENTS.quick:
        height, width, count = 60, 80, 10

    def inputs():
        return smooth_masks(count, 28), random_rois(count, 1, height, width)[:, 1:]

    runs = {
        "ours": lambda m, b: ops.paste_masks(m, b, (height, width)),
        "detectron2": lambda m, b: paste_masks_in_image(m, b, (height, width)),
        "torchvision": lambda m, b: torchvision_paste(m[:, None], b, (height, width)) >= 0.5,
    }

    def error(tensors):
        oracle = mask_reference.paste_masks(tensors[0].double(), tensors[1], height, width)
        return float((runs["ours"](*tensors) != oracle).float().mean())

    yield Case(
        "paste_masks", f"{count} x {height}x{width}", "fwd", inputs, runs, error,
        count * height * width / 1e6, [("detectron2", 5.0), ("torchvision", 10.0)], 3.0,
    )  # fmt: skip


def vote_case():
    height, width, count, results = (60, 80, 20, 5) if ARGUMENTS.quick else (600, 1000, 300, 100)

    def inputs():
        # neighbours of a few true boxes, so that voters overlap
        seeds = random_rois(max(count // 17, 1), 1, height, width)[:, 1:]
        boxes = seeds[torch.randint(len(seeds), (count,))]
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes = boxes + (torch.rand(count, 4, device=DEVICE) - 0.5) * 0.15 * size
        limit = torch.tensor([width, height, width, height], device=DEVICE) - 1
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        scores = torch.rand(count, 1, device=DEVICE)
        chosen = torch.arange(results, device=DEVICE)
        lists = ops.vote_candidates(boxes, scores, chosen, torch.zeros_like(chosen))
        return smooth_masks(count, 21), boxes, *lists

    def published(masks, boxes, index, offset, weight):
        index, offset, weight = (x.tolist() for x in (index, offset, weight))
        lists = [(index[a:b], weight[a:b]) for a, b in zip(offset, offset[1:], strict=False)]
        return peers_of.published_vote(masks.cpu(), boxes.cpu(), lists, height, width)

    runs = {"ours": lambda *x: ops.mask_vote(*x, (height, width)), "numpy + OpenCV": published}

    def error(tensors):
        masks, boxes = mask_reference.mask_vote(tensors[0].double(), *tensors[1:], height, width)
        found, found_boxes = runs["ours"](*tensors)
        same = (found_boxes == boxes).all(1)
        return relative(found[same], masks[same]) + float((~same).float().mean())

    yield Case(
        "mask_vote", f"{count} -> {results} at {height}x{width}", "fwd", inputs, runs, error, 0.7,
        [("numpy + OpenCV", 8.0)],
    )  # fmt: skip


def all_cases():
    for channels, size in ((256, 14), (512, 14), (256, 28), (512, 28)):
        yield from warp_cases(channels, size)
    for channels in (256, 512):
        yield from warp_cases(channels, 14, pool=True)
    for classes in (21, 81):
        yield from head_cases(classes)
        yield from assemble_case(classes)
    yield from paste_case(600, 1000)
    yield from paste_case(800, 1333)
    yield from vote_case()
    if ARGUMENTS.extra:
        for count in (1, 64, 1000):
            yield from warp_cases(256, 14, count=count)
            yield from head_cases(21, count=count)
        yield from warp_cases(256, 14, batch=2)
        yield from head_cases(21, batch=2)
        yield from warp_cases(256, 14, dtype=torch.bfloat16)
        yield from head_cases(21, dtype=torch.bfloat16)
        yield from warp_cases(256, 14, last=True)


# ------------------------------------------------------------------ measuring
def busy_ticks() -> float:
    """Busy seconds of all processors so far."""
    with open("/proc/stat") as stat:
        values = [int(x) for x in stat.readline().split()[1:]]
    return (sum(values[:3]) + sum(values[5:8])) / os.sysconf("SC_CLK_TCK")


def copy_bandwidth() -> float:
    """GB/s of a device copy, read and write counted, outside the caches."""
    source = torch.empty(64 << 20, dtype=torch.float32, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    best = min(time_once(lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * source.numel() * 4 / best / 1e9


def peak_gflops() -> float:
    n = 1024 if DEVICE.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=DEVICE), torch.randn(n, n, device=DEVICE)
    best = min(time_once(lambda: a @ b)[0] for _ in range(5))
    return 2 * n**3 / best / 1e9


def time_once(run: Callable) -> tuple[float, float]:
    """Wall and process CPU seconds."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def graphed(run: Callable, tensors: tuple) -> Callable | None:
    """``run`` as a CUDA graph, or None when it cannot be captured."""
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


def measure(case: Case, rounds: int) -> tuple[dict[str, list[tuple[float, float]]], bool]:
    """Times per implementation, interleaved, and whether others used the processors meanwhile."""
    torch.manual_seed(0)  # the same inputs for every number of threads and every allocator
    sets = [case.inputs() for _ in range(3)]
    while DEVICE.type == "cuda" and len(sets) * case.floor_mb < 150 and len(sets) < 12:
        sets.append(case.inputs())
    times = {name: [] for name in case.runs}
    context = torch.enable_grad if case.direction == "f+b" else torch.no_grad
    with context():
        calls = {name: [lambda r=run, s=s: r(*s) for s in sets] for name, run in case.runs.items()}
        for name in calls:
            for _ in range(2):
                calls[name][0]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            for name, run in case.runs.items():
                if time_once(calls[name][0])[0] < 50e-6:
                    replays = [graphed(run, s) for s in sets]
                    if all(replays):
                        calls[name] = replays
        wall, own, busy = time.perf_counter(), time.process_time(), busy_ticks()
        for i in range(rounds):
            for name in calls:
                times[name].append(time_once(calls[name][i % len(calls[name])]))
        wall = time.perf_counter() - wall
        foreign = busy_ticks() - busy - (time.process_time() - own)
    noisy = DEVICE.type == "cpu" and foreign > 0.1 * wall * (os.cpu_count() or 1)
    return times, noisy


def header(bandwidth: float) -> list[str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            model = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU {model}"
    isa = torch.backends.cpu.get_cpu_capability()
    kind = "native" if ops.has_native() else "PyTorch fallback"
    return [
        f"device {device}, {os.cpu_count()} processors, torch ISA {isa}",
        f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        f"commit {commit or 'unknown'}, extension: {kind}, allocator {ARGUMENTS.allocator}",
        f"copy {bandwidth:.1f} GB/s, matrix product {peak_gflops():.0f} GFLOP/s",
        f"load {os.getloadavg()[0]:.2f}",
    ]


def run_case(
    case: Case, threads: int, bandwidth: float, rounds: int
) -> tuple[list[str], list[str], bool]:
    """Table rows, gate lines, and whether a gate failed on a quiet row."""
    error = case.error(case.inputs())
    print(f"# {case.op} {case.size} {case.direction}: relative error {error:.1e}", file=sys.stderr)
    times, noisy = measure(case, rounds)
    median = {name: statistics.median(t[0] for t in values) for name, values in times.items()}
    # processor time decides ratios on one thread: it does not feel the neighbours
    if DEVICE.type == "cpu" and threads == 1:
        weight = {name: statistics.median(t[1] for t in v) for name, v in times.items()}
    else:
        weight = median
    floor = case.floor_mb / 1e3 / bandwidth
    rows, lines, failed = [], [], False
    for name, values in times.items():
        row = [
            case.op, case.size, case.dtype, case.layout, case.direction, name,
            f"{median[name] * 1e3:.3f}", f"{min(t[0] for t in values) * 1e3:.3f}",
            f"{statistics.median(t[1] for t in values) * 1e3:.3f}", f"{case.floor_mb:.1f}",
            f"{floor * 1e3:.3f}", f"{weight[name] / floor:.1f}",
            f"{weight[name] / weight['ours']:.1f}", f"{error:.1e}" if name == "ours" else "",
            str(threads), "noisy" if noisy else "",
        ]  # fmt: skip
        rows.append(" | ".join(row))
    checks = [
        (f"vs {name} >= {x:g}x", weight[name] / weight["ours"], x, True) for name, x in case.gates
    ]
    if case.floor_gate is not None:
        value = weight["ours"] / floor
        checks.append((f"at most {case.floor_gate:g}x its floor", value, case.floor_gate, False))
    for text, value, limit, more in checks if not ARGUMENTS.quick else []:
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
    rounds = ARGUMENTS.rounds or (20 if DEVICE.type == "cuda" else 5)
    threads_list = [int(x) for x in ARGUMENTS.threads.split(",")] if DEVICE.type == "cpu" else [1]
    torch.set_num_threads(threads_list[0])
    bandwidth = copy_bandwidth()
    report = [*header(bandwidth), "", COLUMNS, " | ".join(["---"] * 16)]
    print("\n".join(report), flush=True)
    gates, failed = [], False
    for threads in threads_list:
        if DEVICE.type == "cpu":
            torch.set_num_threads(threads)
        for case in all_cases():
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
    return 1 if failed and DEVICE.type == "cpu" else 0


if __name__ == "__main__":
    sys.exit(main())
