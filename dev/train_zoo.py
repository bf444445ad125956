#!/usr/bin/env python
"""Train the networks of the model zoo and its ablations, each in a run folder of its own.

    python dev/train_zoo.py FOLDER [--seeds 1 2 3] [--only NAME] [--jobs 2]

Takes hours. A training that has ended is not done again, and one that was stopped continues, so
that this program can be stopped at any time. `dev/write_model_zoo.py FOLDER` makes the page of what
is there.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zoo_plan import RUNS, Run

ROOT = Path(__file__).resolve().parents[1]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at a time, of one thread each"
    )
    parser.add_argument("--max-iter", type=int, help="for a trial; such a run is no part of a zoo")
    return parser


def is_done(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def command(run: Run, seed: int, folder: Path, root: Path, max_iter: int | None) -> list[str]:
    """The command of a training or a test."""
    made = [sys.executable, "-m", "d2ext", "eval" if run.weights_of else "train", run.config]
    options = [*run.options, f"OUTPUT_DIR={folder}", f"SEED={seed}"]
    if max_iter:
        options.append(f"SOLVER.MAX_ITER={max_iter}")
    if run.weights_of:
        weights = root / run.weights_of / f"seed_{seed}" / "model_final.pth"
        options.append(f"MODEL.WEIGHTS={weights}")
    elif (folder / "last_checkpoint").is_file():
        made.append("--resume")
    elif folder.is_dir():
        made.append("--overwrite")
    return [*made, *options]


def commit() -> str:
    """Of the sources that train; "" outside a repository, with a + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", "d2ext", "projects", "configs"]
    )
    return head.stdout.strip() + ("+" if changed.returncode == 1 else "")


def carry_out(run: Run, seed: int, arguments: argparse.Namespace) -> str:
    """Train or test; what came of it in a line. `run.json` stands for an end without an error."""
    root = arguments.folder.resolve()
    folder = root / run.name / f"seed_{seed}"
    shown = f"{run.name}, seed {seed}"
    if is_done(folder):
        return f"{shown}: is there"
    words = command(run, seed, folder, root, arguments.max_iter)
    log = root / "logs" / f"{run.name}_seed_{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a", encoding="utf-8") as f:
        process = subprocess.Popen(words, stdout=f, stderr=f, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        return f"{shown}: failed, see {log}"
    record = {
        "name": run.name,
        "seed": seed,
        "config": run.config,
        "options": list(run.options),
        "weights_of": run.weights_of,
        "commit": commit(),
        "cpu_seconds": round(_seconds(usage)),
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return f"{shown}: {record['cpu_seconds']} s of processor time"


def _seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    arguments = argument_parser().parse_args()
    runs = [run for run in RUNS if arguments.only in run.name]
    # First what others take their weights from, and one seed after the other.
    trained = [(run, seed) for seed in arguments.seeds for run in runs if not run.weights_of]
    tested = [(run, seed) for seed in arguments.seeds for run in runs if run.weights_of]
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for group in (trained, tested):
            for line in pool.map(lambda pair: carry_out(*pair, arguments), group):
                print(line, flush=True)
                failed += "failed" in line
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
