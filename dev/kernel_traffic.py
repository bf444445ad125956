#!/usr/bin/env python
"""Count the memory traffic of the CUDA kernels in the emulation of tests/ops/emulation.

    python dev/kernel_traffic.py --output docs/benchmarks/kernel_traffic.md
    python dev/kernel_traffic.py --only head --before docs/benchmarks/kernel_traffic_before.json

Needs g++ and no GPU. It says what the kernels ask of memory, not how long they take. The inputs are
drawn with fixed seeds, so two runs of the same sources give the same counts.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTOR = 32
HEAD = """# Memory traffic of the CUDA kernels

What `python dev/kernel_traffic.py` counts in the
[emulation](../ops.md#the-cuda-kernels-without-a-gpu), at reduced sizes: nothing here was measured
on a GPU, and nothing says how long a kernel takes.

- **floor**: all input tensors read once and all outputs written once.
- **traffic**: what passes the L1 caches, and what bounds are set on, as a multiple of the floor:
  read sectors of 32 bytes that miss an L1 of 128 KiB which each block has for itself, least
  recently used first to go, so that cells read again by the same block count once; all stored
  sectors; one sector for every atomic addition to another sector of a warp's request; and what
  torch itself zeroes, fills and copies inside of the operator.
- **memory**: what passes an L2 as well: sectors read that it has not, and sectors written back.
  Torch's own bytes are added as if it had nothing of them. No bound is set on it. It has 12 MiB
  for all launches, a quarter of an H100's, as the cases have a quarter of the channels or less.
- **requested**: all sectors of all requests, without a cache.
- **lines a load**: lines of 128 bytes per load of a warp; 1 where neighbours read neighbours, up
  to 32.
- **atomics**: sectors of atomic additions, per output element.
- **bank ways**: how many times longer shared memory takes than without bank conflicts.
- **lanes**: of 32, in the basic blocks that warps run through; the others wait.
- **steps**: basic blocks that warps run through, per 32 elements of input and output: a measure
  of instructions.
- **shared KiB**: static and dynamic shared memory of a block.

Instructions are those of g++, which may load again what nvcc keeps in a register.

"""
COLUMNS = (
    "memory",
    "traffic",
    "requested",
    "lines a load",
    "atomics",
    "bank ways",
    "lanes",
    "steps",
    "shared KiB",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--output", type=Path, help="also write the Markdown page here")
    parser.add_argument("--json", type=Path, help="also write the counts here, for --before")
    parser.add_argument("--before", type=Path, help="counts of other sources, shown beside these")
    parser.add_argument("--kernels", action="store_true", help="a row for every kernel as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------ counting
def moved_by_torch(profile) -> int:
    """Bytes that torch's own zero_, fill_ and copy_ inside of an operator read and write."""
    sizes = {"float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "long int": 8, "int": 4}
    total, until = 0, -1
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        name = event.name()
        if name not in ("aten::zero_", "aten::fill_", "aten::copy_") or event.start_ns() < until:
            continue
        until = event.start_ns() + event.duration_ns()
        operands = 2 if name == "aten::copy_" else 1
        for shape, dtype in zip(event.shapes()[:operands], event.dtypes(), strict=False):
            count = sizes.get(dtype, 1)
            for length in shape:
                count *= length
            total += count
    return total


def count_case(run, inputs) -> dict:
    """Counts of one call: of the whole operator, and of each kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    emulation = torch.ops.d2ext_emulation
    emulation.trace(True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        outputs = run(*inputs)
    kernels = json.loads(emulation.traffic())
    emulation.trace(False)
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    flat = [t for x in (*inputs, *outputs) for t in (x if isinstance(x, list) else [x])]
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    floor = sum(t.numel() * t.element_size() for t in tensors)
    return {
        "floor": floor,
        "outputs": sum(t.numel() for t in outputs if isinstance(t, torch.Tensor)),
        "elements": sum(t.numel() for t in tensors),
        "torch": moved_by_torch(prof),
        "kernels": kernels,
    }


def run_child(only: str) -> None:
    import torch
    from traffic_cases import cases

    assert hasattr(torch.ops.d2ext_emulation, "trace"), "not the emulated kernels"
    found = {}
    for name, make in cases().items():
        if only not in name:
            continue
        torch.manual_seed(0)
        print(name, file=sys.stderr, flush=True)
        with torch.no_grad():
            found[name] = count_case(*make())
        print(json.dumps(found), flush=True)  # the last line counts


# ------------------------------------------------------------------ the table
def summary(case: dict, kernels: list[dict], torch_bytes: int) -> dict[str, str]:
    """The row of some kernels of a case, by column."""

    def total(*keys):
        return sum(kernel[keys[0]][keys[1]] if keys[1:] else kernel[keys[0]] for kernel in kernels)

    kinds = ("read", "write", "atomic")
    missed = sum(total(kind, "missed") for kind in kinds) * SECTOR + torch_bytes
    asked = sum(total(kind, "sectors") for kind in kinds) * SECTOR + torch_bytes
    # Counts from before there was an L2 have none of this.
    fetched = sum(kernel[kind].get("fetched", 0) for kernel in kernels for kind in kinds)
    written = sum(kernel.get("written_back", 0) for kernel in kernels)
    memory = (fetched + written) * SECTOR + torch_bytes if fetched else 0
    ways = total("waves") / total("least_waves") if total("least_waves") else 0
    loads = total("read", "requests")
    return {
        "memory": f"{memory / case['floor']:.2f}x" if memory else "",
        "traffic": f"{missed / case['floor']:.2f}x",
        "requested": f"{asked / case['floor']:.1f}x",
        "lines a load": f"{total('read', 'lines') / loads:.1f}" if loads else "",
        "atomics": f"{total('atomic', 'sectors') / max(case['outputs'], 1):.2f}",
        "bank ways": f"{ways:.1f}" if ways else "",
        "lanes": f"{total('step_lanes') / max(total('steps'), 1):.0f}",
        "steps": f"{total('steps') * 32 / case['elements']:.1f}",
        "shared KiB": f"{max(kernel['shared_bytes'] for kernel in kernels) / 1024:.1f}",
    }


def table(found: dict, before: dict, with_kernels: bool) -> str:
    """Markdown. Where `before` has the case, its value stands in front of an arrow."""
    lines = ["| operator and size | floor MB | " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "---|" * (len(COLUMNS) + 2))
    for name, case in found.items():
        row = summary(case, case["kernels"], case["torch"])
        if name in before:
            old = summary(before[name], before[name]["kernels"], before[name]["torch"])
            row = {c: v if v == old[c] else f"{old[c] or 0} → {v}" for c, v in row.items()}
            row["memory"] = row["memory"].removeprefix("0 → ")
        cells = " | ".join(row[column] for column in COLUMNS)
        lines.append(f"| {name} | {case['floor'] / 1e6:.2f} | {cells} |")
        for kernel in case["kernels"] if with_kernels else []:
            row = summary(case, [kernel], 0)
            text = f"`{kernel['kernel']}`, {kernel['blocks']} blocks"
            lines.append(f"| ... {text} | | " + " | ".join(row[c] for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        return run_child(arguments.only)
    build = [sys.executable, "-W", "ignore", "-m", "tests.ops.emulation.build"]
    built = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    environment = {**os.environ, "PYTHONPATH": built.stdout.strip().splitlines()[-1]}
    environment |= {"OMP_NUM_THREADS": "1", "EMULATION_ORDER": "0", "KINETO_LOG_LEVEL": "9"}
    command = [sys.executable, "-W", "ignore", __file__, "--child", "--only", arguments.only]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(child.stdout.strip().splitlines()[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    before = json.loads(arguments.before.read_text()) if arguments.before else {}
    text = table(found, before, arguments.kernels)
    print(text)
    if arguments.output:
        note = ""
        if before:
            note = (
                "`a → b`: before and after the kernels were changed for their traffic; one number"
            )
            note += " where nothing changed, or was not counted before.\n\n"
        arguments.output.write_text(HEAD + note + text)


if __name__ == "__main__":
    main()
